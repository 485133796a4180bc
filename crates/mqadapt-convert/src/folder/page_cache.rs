//! Hints to the page cache. They are only that: a system without them is slower, nothing else.

use std::fs::File;
use std::sync::Arc;

#[cfg(target_os = "linux")]
mod hints {
    use std::fs::File;
    use std::io;
    use std::num::NonZeroU64;
    use std::os::fd::AsRawFd;

    use rustix::fs::{Advice, fadvise};

    fn advise(file: &File, start: u64, end: u64, advice: Advice) {
        if let Some(len) = NonZeroU64::new(end.saturating_sub(start)) {
            let _ = fadvise(file, start, Some(len), advice);
        }
    }

    /// A range will be read front to back. (Asking for all of it at once is slower: such pages are not read ahead in the
    /// background, and a reader soon waits for each.)
    pub(crate) fn sequential(file: &File, start: u64, end: u64) {
        advise(file, start, end, Advice::Sequential);
    }

    /// Whether most of a range is on the disk only; `false` where the system does not tell (Linux does since 6.5).
    pub(crate) fn is_cold(file: &File, start: u64, end: u64) -> bool {
        /// Bytes of a page, on most machines.
        const PAGE: u64 = 4096;
        /// Number of the system call, on every architecture.
        const CACHESTAT: libc::c_long = 451;
        let range = [start, end.saturating_sub(start)];
        let mut pages = [0u64; 5]; // cached, dirty, being written, evicted, recently evicted
        // SAFETY: both arrays are what the call expects and outlive it; the descriptor is open as long as `file` is
        // borrowed; a system without the call returns an error
        let refused =
            unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), pages.as_mut_ptr(), 0u32) } != 0;
        !refused && pages[0] < range[1].div_ceil(PAGE) / 2
    }

    /// A range will not be read again.
    pub(crate) fn forget(file: &File, start: u64, end: u64) {
        advise(file, start, end, Advice::DontNeed);
    }

    /// Begins writing a range to the disk without waiting for it.
    pub(crate) fn begin_write_back(file: &File, start: u64, end: u64) {
        let _ = sync_range(file, start, end, libc::SYNC_FILE_RANGE_WRITE); // `fsync` tells what goes wrong
    }

    /// Waits until the content of a range is on the disk; `fsync` still has to see to what describes the file.
    ///
    /// An error must not be overlooked: the system tells it once, and `fsync` would find nothing afterwards.
    pub(crate) fn wait_for_disk(file: &File, start: u64, end: u64) -> io::Result<()> {
        let wait = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        match sync_range(file, start, end, wait | libc::SYNC_FILE_RANGE_WRITE) {
            Err(error) if [libc::EIO, libc::ENOSPC, libc::EDQUOT].map(Some).contains(&error.raw_os_error()) => {
                Err(error)
            }
            _ => Ok(()), // this file system cannot
        }
    }

    fn sync_range(file: &File, start: u64, end: u64, flags: libc::c_uint) -> io::Result<()> {
        let (Ok(offset), Ok(len)) = (i64::try_from(start), i64::try_from(end.saturating_sub(start))) else {
            return Ok(());
        };
        // SAFETY: the call takes no pointers, and the descriptor is open as long as `file` is borrowed
        match unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, flags) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod hints {
    use std::fs::File;
    use std::io;

    pub(crate) fn sequential(_file: &File, _start: u64, _end: u64) {}
    pub(crate) fn is_cold(_file: &File, _start: u64, _end: u64) -> bool {
        false
    }
    pub(crate) fn forget(_file: &File, _start: u64, _end: u64) {}
    pub(crate) fn begin_write_back(_file: &File, _start: u64, _end: u64) {}
    pub(crate) fn wait_for_disk(_file: &File, _start: u64, _end: u64) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) use hints::{begin_write_back, forget, wait_for_disk};
use hints::{is_cold, sequential};

/// A range of a file that will be read soon, and once. Afterwards the page cache has of it what it had before.
#[derive(Debug)]
pub(crate) struct ReadHint {
    file: Arc<File>,
    start: u64,
    end: u64,
    cold: bool,
}

impl ReadHint {
    /// Tells the system how the range is read.
    pub fn announce(file: Arc<File>, start: u64, end: u64) -> Self {
        let cold = is_cold(&file, start, end);
        if cold {
            sequential(&file, start, end);
        }
        Self { file, start, end, cold }
    }
}

impl Drop for ReadHint {
    fn drop(&mut self) {
        if self.cold {
            forget(&self.file, self.start, self.end);
        }
    }
}
