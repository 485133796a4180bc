//! Hints to the page cache. All of them are only that: a system without them is slower, nothing else.

#[cfg(target_os = "linux")]
mod hints {
    use std::fs::File;
    use std::num::NonZeroU64;

    use rustix::fs::{Advice, fadvise};

    fn advise(file: &File, start: u64, end: u64, advice: Advice) {
        if let Some(len) = NonZeroU64::new(end.saturating_sub(start)) {
            let _ = fadvise(file, start, Some(len), advice);
        }
    }

    /// A range will be read soon.
    pub(crate) fn will_need(file: &File, start: u64, end: u64) {
        advise(file, start, end, Advice::WillNeed);
    }

    /// A range will not be read again.
    pub(crate) fn forget(file: &File, start: u64, end: u64) {
        advise(file, start, end, Advice::DontNeed);
    }
}

#[cfg(not(target_os = "linux"))]
mod hints {
    use std::fs::File;

    pub(crate) fn will_need(_file: &File, _start: u64, _end: u64) {}
    pub(crate) fn forget(_file: &File, _start: u64, _end: u64) {}
}

pub(crate) use hints::{forget, will_need};

/// Begins writing a range to the disk without waiting for it, and lets go of what was written before it.
pub(crate) fn write_back(file: &std::fs::File, start: u64, end: u64) {
    begin_write_back(file, start, end);
    // pages that are still dirty stay, so this drops what earlier calls have brought to the disk
    forget(file, 0, start);
}

#[cfg(target_os = "linux")]
fn begin_write_back(file: &std::fs::File, start: u64, end: u64) {
    use std::os::fd::AsRawFd;

    if let (Ok(offset), Ok(len)) = (i64::try_from(start), i64::try_from(end.saturating_sub(start))) {
        // SAFETY: the call takes no pointers, and the descriptor is open as long as `file` is borrowed
        unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn begin_write_back(_file: &std::fs::File, _start: u64, _end: u64) {}
