//! Tensors whose values are not one run of a stored tensor: columns of it, or rows among those of other modules. In: a range of
//! values in row-major order; out: their bytes, in memory that does not depend on the tensor's size.

use std::path::Path;

use crate::file::read_exact_at;
use crate::{Result, Shard, View};

/// Most bytes of columns that are read before they are put in order.
const BLOCK: usize = 1 << 20;

impl View {
    /// Fills `out` from value `first_value` on; values have `width` bytes.
    pub(crate) fn read(&self, shard: &Shard, width: usize, first_value: usize, out: &mut [u8]) -> Result<()> {
        let [_, rows, columns] = self.dims;
        let (block_values, path, file) = (rows * columns, shard.path(), shard.file()?);
        let (mut at, mut rest) = (first_value, out);
        let mut scratch = Vec::new();
        while !rest.is_empty() && block_values > 0 {
            let (block, within) = (at / block_values, at % block_values);
            let most = (block_values - within).min(rest.len() / width);
            let place = |row: usize, column: usize| {
                let value = self.first + block * self.strides[0] + row * self.strides[1] + column * self.strides[2];
                self.start + (value * width) as u64
            };
            let (row, column) = (within / columns, within % columns);
            let taken = if self.strides[2] == 1 {
                let run = if self.strides[1] == columns { most } else { most.min(columns - column) };
                read_exact_at(&file, path, place(row, column), &mut rest[..run * width])?;
                run
            } else {
                let count = (within + most).div_ceil(columns) - row;
                let count = count.min(BLOCK / (columns * width)).max(1);
                let taken = most.min((row + count) * columns - within);
                let wanted = Block { within, columns, row, count, width };
                wanted.read(&file, path, |column| place(row, column), &mut scratch, &mut rest[..taken * width])?;
                taken
            };
            rest = &mut rest[taken * width..];
            at += taken;
        }
        Ok(())
    }
}

/// Some rows of a transposed matrix, of which `out` wants a run.
struct Block {
    /// Place of the first wanted value in its block of rows.
    within: usize,
    columns: usize,
    row: usize,
    /// Rows.
    count: usize,
    width: usize,
}

impl Block {
    /// Reads column by column, as they stand, and puts the values where they belong.
    fn read(
        &self,
        file: &std::fs::File,
        path: &Path,
        place: impl Fn(usize) -> u64,
        scratch: &mut Vec<u8>,
        out: &mut [u8],
    ) -> Result<()> {
        let Self { within, columns, row, count, width } = *self;
        scratch.resize(count * width, 0);
        let before = within - row * columns; // values of the first row that are not wanted
        for column in 0..columns {
            read_exact_at(file, path, place(column), scratch)?;
            for (nth, value) in scratch.chunks_exact(width).enumerate() {
                let at = (nth * columns + column).checked_sub(before).map(|at| at * width);
                if let Some(out) = at.and_then(|at| out.get_mut(at..at + width)) {
                    out.copy_from_slice(value);
                }
            }
        }
        Ok(())
    }
}
