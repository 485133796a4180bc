//! Main memory: freed memory goes back to the system, and what the system can still give is known.

use std::fs;

/// Returns the memory of freed allocations to the system.
///
/// A layer's merge goes through phases with large buffers of different sizes. The GNU allocator keeps what one phase has
/// freed (a third of the peak of a large model); elsewhere this does nothing.
pub fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The system is not asked about smaller allocations.
const WORTH_ASKING: u64 = 256 << 20;

/// Whether the system can allocate `bytes`. Linux promises more memory than there is, and ends the process that uses it.
pub(crate) fn may_take(bytes: u64) -> bool {
    bytes <= WORTH_ASKING || available().is_none_or(|available| bytes <= available)
}

/// Bytes that this process may still take, by what the system says; `None` where it does not say.
fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kilobytes = |name: &str| -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(name))?.trim().trim_end_matches(" kB").parse().ok()
    };
    let free = kilobytes("MemAvailable:")?.saturating_add(kilobytes("SwapFree:")?).saturating_mul(1024);
    // the limit of a container, by either version of control groups
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = limits.iter().find_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok());
    Some(free.min(limit.unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_os = "linux")]
    fn some_memory_is_available() {
        let bytes = super::available().expect("Linux says it");
        assert!((1 << 20..1 << 50).contains(&bytes), "{bytes}");
    }
}
