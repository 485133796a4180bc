//! Rows of K or V as integers with one scale: what a row is, and how it is made from floats.
//!
//! A row is one head's values of one token behind [`rotate`]. Value `d` is `level * scale`: with 8 bits the level is the
//! integer itself; with 4 bits it is one of sixteen, by the half of a byte.

use crate::{
    Cpu,
    hadamard::rotate_body,
    pool::Parts,
    scratch,
    simd::{Simd, kernel},
};
use half::f16;

/// Bits of a stored value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvBits {
    /// An integer from -127 to 127.
    Eight,
    /// Two values a byte: value `d` of the first half of a row in the low half of byte `d`, of the second half in the high.
    Four,
}

/// The sixteen levels of 4 bits: those of least square error for a normal distribution (Max 1960), as integers.
pub(super) const LEVELS: [i8; 16] = [-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127];
/// The largest level in standard deviations of that distribution.
const LARGEST: f32 = 2.7326;
/// How often levels are chosen for a scale, and the scale for levels.
const ROUNDS: usize = 3;

impl KvBits {
    /// Bytes of a row, its scale apart.
    #[must_use]
    pub fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::Eight => head_dim,
            Self::Four => head_dim.div_ceil(2),
        }
    }
}

/// K or V of one layer as integers.
#[derive(Debug, Clone, Copy)]
pub struct PackedKv<'a> {
    /// `[num_key_value_heads, positions, row_bytes]`
    pub values: &'a [i8],
    /// `[num_key_value_heads, positions]`
    pub scales: &'a [f16],
    /// Positions of the cache.
    pub positions: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Bits of a value.
    pub bits: KvBits,
}

/// [`PackedKv`], to be written by [`Cpu::store_packed`].
#[derive(Debug)]
pub struct PackedKvMut<'a> {
    /// `[num_key_value_heads, positions, row_bytes]`
    pub values: &'a mut [i8],
    /// `[num_key_value_heads, positions]`
    pub scales: &'a mut [f16],
    /// Positions of the cache.
    pub positions: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Bits of a value.
    pub bits: KvBits,
}

impl Cpu {
    /// Stores `src`, `[rows, num_key_value_heads, head_dim]`, at cache positions `start..start + rows`.
    ///
    /// # Panics
    /// If a shape does not fit or a row lies outside of the cache.
    pub fn store_packed(&self, src: &[f32], num_key_value_heads: usize, to: &mut PackedKvMut<'_>, start: usize) {
        let PackedKvMut { ref mut values, ref mut scales, positions, head_dim, bits } = *to;
        let (row_len, row_bytes) = (num_key_value_heads * head_dim, bits.row_bytes(head_dim));
        assert!(row_len > 0 && src.len().is_multiple_of(row_len), "src is [rows, {num_key_value_heads}, {head_dim}]");
        assert!(start + src.len() / row_len <= positions, "rows lie within the cache");
        let (values, scales) = (Parts::new(values), Parts::new(scales));
        self.by_rows(src.len() / row_len, row_len, |first, rows| {
            scratch::with(head_dim, |head: &mut [f32]| {
                for row in first..first + rows {
                    for (nth, from) in src[row * row_len..][..row_len].chunks_exact(head_dim).enumerate() {
                        let at = nth * positions + start + row;
                        // SAFETY: rows and heads are disjoint; a `Cpu` holds only an available `isa`.
                        unsafe {
                            let (values, scale) = (values.part(at * row_bytes, row_bytes), scales.part(at, 1));
                            head.copy_from_slice(from);
                            match bits {
                                KvBits::Eight => pack_int8(self.isa, head, values, &mut scale[0]),
                                KvBits::Four => pack_int4(self.isa, head, values, &mut scale[0]),
                            }
                        }
                    }
                }
            });
        });
    }
}

kernel! { fn pack_int8 = pack_int8_body(head: &mut [f32], to: &mut [i8], scale: &mut f16) }
kernel! { fn pack_int4 = pack_int4_body(head: &mut [f32], to: &mut [i8], scale: &mut f16) }

/// A scale as it is stored, and its inverse; zero where there is none.
#[inline(always)]
fn stored(scale: f32) -> (f16, f32) {
    let stored = f16::from_f32(scale.min(f16::MAX.to_f32()));
    let inverse = 1.0 / stored.to_f32();
    (stored, if inverse.is_finite() { inverse } else { 0.0 })
}

/// # Safety
/// None beyond that of [`Simd`].
#[inline(always)]
unsafe fn pack_int8_body<S: Simd>(head: &mut [f32], to: &mut [i8], scale: &mut f16) {
    // SAFETY: the caller's promise.
    unsafe { rotate_body::<S>(head) };
    let largest = head.iter().fold(0f32, |most, x| if x.abs() > most { x.abs() } else { most });
    let (stored, inverse) = stored(largest / 127.0);
    for (to, x) in to.iter_mut().zip(&*head) {
        *to = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    *scale = stored;
}

/// # Safety
/// None beyond that of [`Simd`].
#[inline(always)]
unsafe fn pack_int4_body<S: Simd>(head: &mut [f32], to: &mut [i8], scale: &mut f16) {
    // SAFETY: the caller's promise.
    unsafe { rotate_body::<S>(head) };
    let energy: f32 = head.iter().map(|x| x * x).sum();
    let mut fitted = (energy / head.len() as f32).sqrt() * (LARGEST / 127.0);
    for _ in 0..ROUNDS {
        let inverse = if fitted > 0.0 { 1.0 / fitted } else { 0.0 };
        let (mut product, mut square) = (0.0, 0.0);
        for x in &*head {
            let level = f32::from(LEVELS[usize::from(nearest(x * inverse))]);
            product += level * x;
            square += level * level;
        }
        fitted = product / square;
    }
    let (stored, inverse) = stored(fitted);
    let half = to.len();
    for (i, to) in to.iter_mut().enumerate() {
        let high = head.get(half + i).map_or(0, |x| nearest(x * inverse));
        *to = (nearest(head[i] * inverse) | high << 4).cast_signed();
    }
    *scale = stored;
}

/// The number of the level that is nearest to `x`.
#[inline(always)]
fn nearest(x: f32) -> u8 {
    let mut above = 0;
    for pair in LEVELS.windows(2) {
        let middle = 0.5 * (f32::from(pair[0]) + f32::from(pair[1]));
        above += u8::from(x > middle);
    }
    above
}
