//! Moving bytes from file to file: inside the kernel where it can, through a buffer where it cannot.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use mqadapt_checkpoint::Shard;
use rustix::fs::copy_file_range;
use rustix::io::Errno;

use crate::{Error, Result};

/// Copies ranges between files.
pub(crate) struct Transfer {
    /// The kernel copies between these two file systems, as far as we know.
    in_kernel: bool,
    buffer: Vec<u8>,
}

impl Transfer {
    pub fn new(buffer_bytes: usize) -> Self {
        Self { in_kernel: true, buffer: vec![0; buffer_bytes] }
    }

    /// Copies `len` bytes of a source shard.
    pub fn copy(
        &mut self,
        from: &Shard,
        from_offset: u64,
        to: &File,
        to_path: &Path,
        to_offset: u64,
        len: u64,
    ) -> Result<()> {
        let done = if self.in_kernel { self.copy_in_kernel(from, from_offset, to, to_offset, len)? } else { 0 };
        self.copy_through_buffer(from, from_offset + done, to, to_path, to_offset + done, len - done)
    }

    /// Bytes that the kernel copied. Whatever it objects to is tried again through the buffer, which does it or says which
    /// side is at fault.
    fn copy_in_kernel(&mut self, from: &Shard, from_offset: u64, to: &File, to_offset: u64, len: u64) -> Result<u64> {
        let file = from.file()?;
        let mut done = 0;
        while done < len {
            let (mut off_in, mut off_out) = (from_offset + done, to_offset + done);
            let most = usize::try_from(len - done).unwrap_or(usize::MAX);
            match copy_file_range(&*file, Some(&mut off_in), to, Some(&mut off_out), most) {
                Ok(0) => break,
                Ok(count) => done += count as u64,
                Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::PERM) => {
                    self.in_kernel = false;
                    break;
                }
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn copy_through_buffer(
        &mut self,
        from: &Shard,
        from_offset: u64,
        to: &File,
        to_path: &Path,
        to_offset: u64,
        len: u64,
    ) -> Result<()> {
        let mut done = 0;
        while done < len {
            let most = usize::try_from(len - done).unwrap_or(usize::MAX).min(self.buffer.len());
            let Some(piece) = self.buffer.get_mut(..most) else { break };
            from.read_exact_at(from_offset + done, piece)?;
            write_all_at(to, to_path, to_offset + done, piece)?;
            done += most as u64;
        }
        Ok(())
    }
}

/// Writes all of `bytes` at `offset`.
pub(crate) fn write_all_at(file: &File, path: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    file.write_all_at(bytes, offset).map_err(Error::io::<io::Error>("write", path))
}
