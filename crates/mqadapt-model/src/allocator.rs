//! Memory that is free, given back.

/// Gives the memory of freed allocations back to the system.
///
/// A layer's merge goes through phases with large buffers of different sizes. The GNU allocator keeps what one phase has
/// freed (a third of the peak of a large model); elsewhere this does nothing.
pub(crate) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
