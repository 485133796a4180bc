//! Weights and caches in main memory: floats of a dtype chosen at run time, aligned to cache lines, so that no vector
//! load crosses two of them.

use std::alloc::{Layout, alloc_zeroed};
use std::ptr;

use half::{bf16, f16};
use mqadapt_core::DType;
use mqadapt_kernels::{FloatsMut, FloatsRef, WeightsRef};

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Whole cache lines.
#[derive(Clone)]
pub(crate) struct Lines(Vec<Line>);

/// Floats of one dtype.
#[derive(Clone)]
pub(crate) struct Floats {
    lines: Lines,
    len: usize,
    dtype: DType,
}

/// A float that a run of bytes can be seen as.
///
/// # Safety
/// Implementors accept every bit pattern and need no more than 64-byte alignment.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: a plain number.
unsafe impl Plain for u8 {}
// SAFETY: a plain number.
unsafe impl Plain for i8 {}
// SAFETY: a plain number.
unsafe impl Plain for f32 {}
// SAFETY: a transparent wrapper of a plain number.
unsafe impl Plain for f16 {}
// SAFETY: a transparent wrapper of a plain number.
unsafe impl Plain for bf16 {}

impl Lines {
    /// Zeros, in memory that is taken when it is first written.
    pub(crate) fn zeros(bytes: usize) -> Self {
        Self::try_zeros(bytes).unwrap_or_else(|| panic!("no memory for {bytes} bytes"))
    }

    /// [`Self::zeros`]; `None` if there is not that much memory.
    fn try_zeros(bytes: usize) -> Option<Self> {
        let lines = bytes.div_ceil(size_of::<Line>());
        if lines == 0 {
            return Some(Self(Vec::new()));
        }
        let layout = Layout::array::<Line>(lines).ok()?;
        // SAFETY: the layout is not of size zero.
        let start = unsafe { alloc_zeroed(layout) };
        #[allow(clippy::cast_ptr_alignment)] // allocated with the alignment of lines
        let all = ptr::slice_from_raw_parts_mut(start.cast::<Line>(), lines);
        // SAFETY: the allocator that `Box` uses gave it, with the layout of so many lines, and zeros are a line.
        (!start.is_null()).then(|| Self(unsafe { Box::from_raw(all) }.into_vec()))
    }

    /// The first `len` values.
    pub(crate) fn slice<T: Plain>(&self, len: usize) -> &[T] {
        assert!(len * size_of::<T>() <= size_of_val(&*self.0));
        // SAFETY: the lines are initialised and hold `len` values, any bits are a `T`, and lines are aligned enough.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), len) }
    }

    /// The first `len` values.
    pub(crate) fn slice_mut<T: Plain>(&mut self, len: usize) -> &mut [T] {
        assert!(len * size_of::<T>() <= size_of_val(&*self.0));
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

impl Floats {
    pub(crate) fn zeros(len: usize, dtype: DType) -> Self {
        Self { lines: Lines::zeros(len * dtype.bytes()), len, dtype }
    }

    /// [`Self::zeros`]; `None` if there is not that much memory.
    pub(crate) fn try_zeros(len: usize, dtype: DType) -> Option<Self> {
        Some(Self { lines: Lines::try_zeros(len.checked_mul(dtype.bytes())?)?, len, dtype })
    }

    /// Each value rounded once, ties to even.
    pub(crate) fn from_f32(values: &[f32], dtype: DType) -> Self {
        let mut out = Self::zeros(values.len(), dtype);
        match out.as_mut() {
            FloatsMut::F32(out) => out.copy_from_slice(values),
            FloatsMut::F16(out) => out.iter_mut().zip(values).for_each(|(o, v)| *o = f16::from_f32(*v)),
            FloatsMut::Bf16(out) => out.iter_mut().zip(values).for_each(|(o, v)| *o = bf16::from_f32(*v)),
            _ => {}
        }
        out
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Some values from the first on.
    pub(crate) fn read(&self, first: usize, out: &mut [f32]) {
        match self.as_ref() {
            FloatsRef::F32(values) => out.copy_from_slice(&values[first..first + out.len()]),
            FloatsRef::F16(values) => out.iter_mut().zip(&values[first..]).for_each(|(o, v)| *o = v.to_f32()),
            FloatsRef::Bf16(values) => out.iter_mut().zip(&values[first..]).for_each(|(o, v)| *o = v.to_f32()),
            _ => {}
        }
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        self.lines.0.capacity() * size_of::<Line>()
    }

    /// The values as bytes of this machine.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.lines.slice_mut(self.len * self.dtype.bytes())
    }

    pub(crate) fn as_ref(&self) -> FloatsRef<'_> {
        match self.dtype {
            DType::F32 => FloatsRef::F32(self.lines.slice(self.len)),
            DType::F16 => FloatsRef::F16(self.lines.slice(self.len)),
            DType::BF16 => FloatsRef::Bf16(self.lines.slice(self.len)),
        }
    }

    pub(crate) fn as_mut(&mut self) -> FloatsMut<'_> {
        match self.dtype {
            DType::F32 => FloatsMut::F32(self.lines.slice_mut(self.len)),
            DType::F16 => FloatsMut::F16(self.lines.slice_mut(self.len)),
            DType::BF16 => FloatsMut::Bf16(self.lines.slice_mut(self.len)),
        }
    }

    /// As a weight matrix.
    pub(crate) fn weights(&self) -> WeightsRef<'_> {
        match self.dtype {
            DType::F32 => WeightsRef::F32(self.lines.slice(self.len)),
            DType::F16 => WeightsRef::F16(self.lines.slice(self.len)),
            DType::BF16 => WeightsRef::Bf16(self.lines.slice(self.len)),
        }
    }

    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len];
        self.read(0, &mut out);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_rounded_once_and_aligned() {
        for (dtype, third) in [(DType::F32, 1.0f32 / 3.0), (DType::F16, 0.333_251_95), (DType::BF16, 0.333_984_38)] {
            let floats = Floats::from_f32(&[1.0, 1.0 / 3.0, -2.0], dtype);
            assert_eq!(floats.to_f32(), [1.0, third, -2.0]);
            assert_eq!(floats.lines.0.as_ptr() as usize % 64, 0);
            assert_eq!((floats.bytes(), floats.clone().bytes_mut().len()), (64, 3 * dtype.bytes()));
        }
    }
}
