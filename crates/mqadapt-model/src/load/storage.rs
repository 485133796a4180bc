//! Weights and caches in main memory: floats of a dtype chosen at run time, aligned to cache lines, so that no vector
//! load crosses two of them.

use std::alloc::{Layout, alloc_zeroed};
use std::ptr;
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::MmapMut;
use mqadapt_core::DType;
use mqadapt_kernels::{FloatsMut, FloatsRef, WeightsRef};

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Whole cache lines.
pub(crate) struct Lines(Memory);

enum Memory {
    Own(Vec<Line>),
    /// Lines of a block that nobody else has.
    Part {
        block: Arc<Allocation>,
        first: usize,
        lines: usize,
    },
}

/// Memory that several matrices share, in large pages where the system has them: decoding reads all of it for every token, 8 %
/// faster than in pages of 4 KB.
struct Allocation {
    start: *mut Line,
    _map: MmapMut,
}

// SAFETY: it is memory of its own; its parts are handed out once each.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Allocation {
    const LARGE_PAGE: usize = 2 << 20;
    /// Bytes of a block, unless one matrix needs more: enough for several large pages, little to keep for one matrix that is left.
    const BYTES: usize = 32 << 20;

    /// Zeros, in memory that is taken when it is first written.
    fn zeros(lines: usize) -> Option<Self> {
        let bytes = lines.checked_mul(size_of::<Line>())?;
        let mut map = MmapMut::map_anon(bytes.checked_add(Self::LARGE_PAGE)?).ok()?;
        let offset = map.as_ptr().align_offset(Self::LARGE_PAGE);
        // what is left over stays in small pages, so that no memory is taken beyond the end
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(memmap2::Advice::HugePage, offset, bytes - bytes % Self::LARGE_PAGE); // or it stays as it is
        #[allow(clippy::cast_ptr_alignment)] // aligned to a large page
        let start = map.as_mut_ptr().wrapping_add(offset).cast();
        Some(Self { start, _map: map })
    }
}

impl Clone for Lines {
    fn clone(&self) -> Self {
        Self(Memory::Own(self.all().to_vec()))
    }
}

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
    pub(crate) fn try_zeros(bytes: usize) -> Option<Self> {
        let lines = bytes.div_ceil(size_of::<Line>());
        if lines == 0 {
            return Some(Self(Memory::Own(Vec::new())));
        }
        let layout = Layout::array::<Line>(lines).ok()?;
        // SAFETY: the layout is not of size zero.
        let start = unsafe { alloc_zeroed(layout) };
        #[allow(clippy::cast_ptr_alignment)] // allocated with the alignment of lines
        let all = ptr::slice_from_raw_parts_mut(start.cast::<Line>(), lines);
        // SAFETY: the allocator that `Box` uses gave it, with the layout of so many lines, and zeros are a line.
        (!start.is_null()).then(|| Self(Memory::Own(unsafe { Box::from_raw(all) }.into_vec())))
    }

    fn all(&self) -> &[Line] {
        match &self.0 {
            Memory::Own(lines) => lines,
            // SAFETY: within the block, initialised with zeros, and nobody else has these lines.
            Memory::Part { block, first, lines } => unsafe {
                std::slice::from_raw_parts(block.start.add(*first), *lines)
            },
        }
    }

    fn all_mut(&mut self) -> &mut [Line] {
        match &mut self.0 {
            Memory::Own(lines) => lines,
            // SAFETY: as above, and borrowed mutably.
            Memory::Part { block, first, lines } => unsafe {
                std::slice::from_raw_parts_mut(block.start.add(*first), *lines)
            },
        }
    }

    /// The first `len` values.
    pub(crate) fn slice<T: Plain>(&self, len: usize) -> &[T] {
        let lines = self.all();
        assert!(len * size_of::<T>() <= size_of_val(lines));
        // SAFETY: the lines are initialised and hold `len` values, any bits are a `T`, and lines are aligned enough.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), len) }
    }

    /// The first `len` values.
    pub(crate) fn slice_mut<T: Plain>(&mut self, len: usize) -> &mut [T] {
        let lines = self.all_mut();
        assert!(len * size_of::<T>() <= size_of_val(lines));
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), len) }
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

    /// [`Self::zeros`] for each of `wanted`, neighbours next to each other in shared blocks; if there is not that much memory,
    /// the place of one that found none.
    pub(crate) fn try_zeros_together(wanted: &[(usize, DType)]) -> Result<Vec<Self>, usize> {
        let lines = |&(len, dtype): &(usize, DType)| {
            let bytes = len.checked_mul(dtype.bytes())?.checked_next_multiple_of(size_of::<Line>())?;
            Some(bytes / size_of::<Line>())
        };
        let mut all = Vec::with_capacity(wanted.len());
        while let Some(first) = wanted.get(all.len()) {
            let begin = all.len();
            let mut total = lines(first).ok_or(begin)?;
            let mut firsts = vec![0];
            for next in &wanted[begin + 1..] {
                let next = lines(next).and_then(|lines| lines.checked_add(total));
                let Some(end) = next.filter(|&end| end <= Allocation::BYTES / size_of::<Line>()) else { break };
                firsts.push(total);
                total = end;
            }
            let block = Arc::new(Allocation::zeros(total).ok_or(begin)?);
            let ends = firsts[1..].iter().copied().chain([total]);
            for ((&first, end), &(len, dtype)) in firsts.iter().zip(ends).zip(&wanted[begin..]) {
                let lines = Lines(Memory::Part { block: Arc::clone(&block), first, lines: end - first });
                all.push(Self { lines, len, dtype });
            }
        }
        Ok(all)
    }

    /// Each value rounded once, ties to even.
    pub(crate) fn from_f32(values: &[f32], dtype: DType) -> Self {
        let mut out = Self::zeros(values.len(), dtype);
        out.fill_from_f32(values);
        out
    }

    /// Each value rounded once, ties to even.
    ///
    /// # Panics
    /// If there are not as many.
    pub(crate) fn fill_from_f32(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.len);
        match self.as_mut() {
            FloatsMut::F32(out) => out.copy_from_slice(values),
            FloatsMut::F16(out) => out.iter_mut().zip(values).for_each(|(o, v)| *o = f16::from_f32(*v)),
            FloatsMut::Bf16(out) => out.iter_mut().zip(values).for_each(|(o, v)| *o = bf16::from_f32(*v)),
            _ => {}
        }
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
        size_of_val(self.lines.all())
    }

    /// Whether all bits are the same.
    pub(crate) fn same(&self, other: &Self) -> bool {
        let bytes = |floats: &Self| floats.len * floats.dtype.bytes();
        self.dtype == other.dtype && self.lines.slice::<u8>(bytes(self)) == other.lines.slice::<u8>(bytes(other))
    }

    /// The values as bytes of this machine.
    pub(crate) fn stored(&self) -> &[u8] {
        self.lines.slice(self.len * self.dtype.bytes())
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
            assert_eq!(floats.lines.all().as_ptr() as usize % 64, 0);
            assert_eq!((floats.bytes(), floats.clone().bytes_mut().len()), (64, 3 * dtype.bytes()));
        }
    }
    #[test]
    fn neighbours_share_blocks_and_nothing_else() {
        let large = Allocation::BYTES / 2 + 64;
        let wanted = [(3, DType::F32), (0, DType::BF16), (large, DType::BF16), (5, DType::F16), (large, DType::F32)];
        let mut all = Floats::try_zeros_together(&wanted).unwrap();
        for (nth, (floats, (len, dtype))) in all.iter_mut().zip(wanted).enumerate() {
            assert_eq!((floats.len(), floats.dtype()), (len, dtype));
            assert!(floats.to_f32().iter().all(|&value| value == 0.0));
            floats.fill_from_f32(&vec![nth as f32 + 1.0; len]);
        }
        let copy = all[3].clone();
        drop(all.remove(2));
        for (floats, value) in all.iter().zip([1.0, 2.0, 4.0, 5.0]) {
            assert!(floats.to_f32().iter().all(|&v| v == value));
        }
        assert_eq!(copy.to_f32(), [4.0; 5]);
        assert_eq!(Floats::try_zeros_together(&[(1, DType::F32), (usize::MAX / 8, DType::F32)]).err(), Some(1));
    }
}
