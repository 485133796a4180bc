//! Values of any range of a tensor, dequantised on the way, with rows put back in the Hugging Face order.
//!
//! In: blocks of the file, read a bounded buffer at a time. Out: little-endian values of the dtype asked for, each rounded
//! once.

use mqadapt_core::DType;

use super::dequantize;
use super::ggml_type::GgmlType;
use super::names::permuted_row;
use super::source::Source;
use crate::cast::convert;
use crate::{Result, TensorInfo};

/// Bytes of the file that a call holds at a time.
const BUFFER_BYTES: usize = 1 << 18;
/// Most bytes of a head that are read at once to put its rows in order; longer ones are read row by row.
const HEAD_BYTES: usize = 1 << 20;
/// Values dequantised before they are rounded, which fit the first-level cache.
const PIECE: usize = 4096;

/// Reads one tensor's stored values.
pub(super) struct Reader<'a> {
    pub source: &'a dyn Source,
    pub ty: GgmlType,
    /// Where the tensor begins in the source.
    pub offset: u64,
    /// What the values are rounded to.
    pub dtype: DType,
    /// The stored values are 1 larger, which is taken off in f32 before they are rounded.
    pub plus_one: bool,
}

/// Fills `out` with a tensor's values from `first_value` on, which the caller has checked to be inside. Returns how many
/// finite values became infinite.
pub(super) fn read_as(
    reader: &Reader,
    tensor: &TensorInfo,
    permuted_head_dim: Option<usize>,
    first_value: usize,
    out: &mut [u8],
) -> Result<u64> {
    let Some(head_dim) = permuted_head_dim else { return reader.read(first_value, out) };
    let row: usize = tensor.shape.get(1..).unwrap_or_default().iter().product();
    let row_bytes = row / reader.ty.block_values() * reader.ty.block_bytes();
    let mut head_bytes = vec![0; if row_bytes * head_dim <= HEAD_BYTES { row_bytes * head_dim } else { 0 }];
    let (mut position, mut rest, mut overflowed) = (first_value, out, 0);
    while !rest.is_empty() {
        // as much of the current head as is wanted
        let head = position / (row * head_dim);
        let wanted = ((head + 1) * row * head_dim - position).min(rest.len() / reader.dtype.bytes());
        let (mut part, after) = rest.split_at_mut(wanted * reader.dtype.bytes());
        // for a small part of a head, reading the whole head would cost more than its rows one by one
        let buffered = !head_bytes.is_empty() && wanted > row.max(row * head_dim / 4);
        if buffered {
            let offset = reader.offset + (head * head_dim * row_bytes) as u64;
            reader.source.read_exact_at(offset, &mut head_bytes)?;
        }
        while !part.is_empty() {
            let (row_idx, within) = (position / row, position % row);
            let count = (row - within).min(part.len() / reader.dtype.bytes());
            let (values, others) = part.split_at_mut(count * reader.dtype.bytes());
            let stored_row = permuted_row(row_idx, head_dim);
            overflowed += if buffered {
                let start = (stored_row - head * head_dim) * row_bytes;
                let stored = head_bytes.get(start..start + row_bytes).unwrap_or_default();
                reader.decode(stored, within, values)
            } else {
                reader.read(stored_row * row + within, values)?
            };
            (position, part) = (position + count, others);
        }
        rest = after;
    }
    Ok(overflowed)
}

impl Reader<'_> {
    /// Values in the order of the file, from `first_value` on. Reads only the blocks that hold them.
    pub(super) fn read(&self, first_value: usize, out: &mut [u8]) -> Result<u64> {
        let (block_values, block_bytes) = (self.ty.block_values(), self.ty.block_bytes());
        let at_once = BUFFER_BYTES / block_bytes * block_values;
        let count = out.len() / self.dtype.bytes();
        let blocks = (first_value % block_values + count).div_ceil(block_values);
        let mut buffer = vec![0; blocks.saturating_mul(block_bytes).min(BUFFER_BYTES / block_bytes * block_bytes)];
        let (mut position, mut rest, mut overflowed) = (first_value, out, 0);
        while !rest.is_empty() {
            let skip = position % block_values;
            let count = (at_once - skip).min(rest.len() / self.dtype.bytes());
            let (part, after) = rest.split_at_mut(count * self.dtype.bytes());
            let bytes = (skip + count).div_ceil(block_values) * block_bytes;
            let blocks = buffer.get_mut(..bytes).unwrap_or_default();
            self.source.read_exact_at(self.offset + (position / block_values * block_bytes) as u64, blocks)?;
            overflowed += self.decode(blocks, skip, part);
            (position, rest) = (position + count, after);
        }
        Ok(overflowed)
    }

    /// Rounds the values of whole blocks, from value `skip` on, into `out`.
    fn decode(&self, blocks: &[u8], skip: usize, out: &mut [u8]) -> u64 {
        let (block_values, block_bytes) = (self.ty.block_values(), self.ty.block_bytes());
        let blocks = blocks.get(skip / block_values * block_bytes..).unwrap_or_default();
        let (mut skip, mut rest, mut overflowed) = (skip % block_values, out, 0);
        let mut scratch = [0; 4 * PIECE];
        for blocks in blocks.chunks(PIECE / block_values * block_bytes) {
            let values = blocks.len() / block_bytes * block_values;
            let count = (values - skip).min(rest.len() / self.dtype.bytes());
            if count == 0 {
                break;
            }
            let (part, after) = rest.split_at_mut(count * self.dtype.bytes());
            match self.dtype {
                DType::F32 if count == values && !self.plus_one => dequantize::to_f32(self.ty, blocks, part),
                DType::BF16 if count == values && !self.plus_one => dequantize::to_bf16(self.ty, blocks, part),
                _ => {
                    // a part of a block at either end, a type that can overflow, or a norm
                    let scratch = scratch.get_mut(..4 * values).unwrap_or_default();
                    dequantize::to_f32(self.ty, blocks, scratch);
                    if self.plus_one {
                        subtract_one(scratch);
                    }
                    let wanted = scratch.get(4 * skip..4 * (skip + count)).unwrap_or_default();
                    overflowed += convert(DType::F32, wanted, self.dtype, part);
                }
            }
            (skip, rest) = (0, after);
        }
        overflowed
    }
}

fn subtract_one(values: &mut [u8]) {
    for value in values.as_chunks_mut().0 {
        *value = (f32::from_le_bytes(*value) - 1.0).to_le_bytes();
    }
}
