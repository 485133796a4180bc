//! Scratch memory of one thread, kept between calls so that steady state allocates nothing.

use std::cell::RefCell;

/// One cache line: the alignment of all scratch memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Plain numbers that scratch memory may hold: any bit pattern is a value.
///
/// # Safety
/// Implementors accept every bit pattern and need no more than 64-byte alignment.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: all are plain numbers or transparent wrappers of one.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for half::bf16 {}
// SAFETY: as above.
unsafe impl Plain for i8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}

/// Calls `f` with `len` values of unspecified content, aligned to 64 bytes, from this thread's store.
///
/// Calls may nest: each takes its own buffer. The store is a stack, so a nest of calls in a fixed order
/// finds the buffers it used the last time.
pub(crate) fn with<T: Plain, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
    let mut buffer = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < lines {
        buffer.resize(lines, Line([0; 64]));
    }
    // SAFETY: the buffer holds at least `len * size_of::<T>()` initialised bytes at alignment 64, and any bits are a `T`.
    let values = unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast::<T>(), len) };
    let result = f(values);
    FREE.with_borrow_mut(|free| free.push(buffer));
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_buffers_are_distinct_and_aligned() {
        with(10, |outer: &mut [f32]| {
            outer.fill(1.0);
            with(20, |inner: &mut [f32]| {
                assert_eq!(inner.as_ptr() as usize % 64, 0);
                inner.fill(2.0);
            });
            assert!(outer.iter().all(|&value| value == 1.0));
        });
    }
}
