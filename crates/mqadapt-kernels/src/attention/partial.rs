//! Softmax over a part of the positions, and how parts merge.

use crate::{
    Isa,
    simd::{Simd, kernel},
};

/// Softmax over some positions, before the division: per query the largest score, the sum of `e^(score - largest)`, and
/// the values weighted so.
pub(super) struct Partial<'a> {
    pub(super) largest: &'a mut [f32],
    pub(super) sums: &'a mut [f32],
    /// `[queries, v.head_dim]`
    pub(super) values: &'a mut [f32],
}

impl<'a> Partial<'a> {
    pub(super) fn new(memory: &'a mut [f32], queries: usize, head_dim: usize) -> Self {
        let (largest, rest) = memory.split_at_mut(queries);
        let (sums, rest) = rest.split_at_mut(queries);
        Self { largest, sums, values: &mut rest[..queries * head_dim] }
    }

    pub(super) fn clear(&mut self) {
        self.largest.fill(f32::NEG_INFINITY);
        self.sums.fill(0.0);
        self.values.fill(0.0);
    }

    /// Takes in the positions of `next`.
    pub(super) fn merge(&mut self, isa: Isa, next: &Partial<'_>) {
        let dim = self.values.len() / self.sums.len();
        for query in 0..self.sums.len() {
            let (a, b) = (self.largest[query], next.largest[query]);
            if b == f32::NEG_INFINITY {
                continue;
            }
            let (to, from) = (&mut self.values[query * dim..][..dim], &next.values[query * dim..][..dim]);
            if a == f32::NEG_INFINITY {
                to.copy_from_slice(from);
                (self.largest[query], self.sums[query]) = (b, next.sums[query]);
                continue;
            }
            let largest = if a > b { a } else { b };
            // SAFETY: two slices of `dim`; a `Cpu` holds only an available `isa`.
            let [old, new] = unsafe { blend(isa, to.as_mut_ptr(), from.as_ptr(), dim, a - largest, b - largest) };
            self.sums[query] = self.sums[query] * old + next.sums[query] * new;
            self.largest[query] = largest;
        }
    }
}

kernel! { pub(super) fn scale = scale_body(x: *mut f32, n: usize, factor: f32) }
kernel! { fn blend = blend_body(to: *mut f32, from: *const f32, n: usize, to_log: f32, from_log: f32) -> [f32; 2] }

/// # Safety
/// `x` has `n` values.
#[inline(always)]
unsafe fn scale_body<S: Simd>(x: *mut f32, n: usize, factor: f32) {
    let mut i = 0;
    while i < n {
        // SAFETY: the caller's promise.
        unsafe { S::store_some(x.add(i), n - i, S::mul(S::load_some(x.add(i), n - i), S::splat(factor))) };
        i += S::LANES;
    }
}

/// `to = to * e^to_log + from * e^from_log`; returns the two factors.
///
/// # Safety
/// `to` and `from` have `n` values.
#[inline(always)]
unsafe fn blend_body<S: Simd>(to: *mut f32, from: *const f32, n: usize, to_log: f32, from_log: f32) -> [f32; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (S::exp(S::splat(to_log)), S::exp(S::splat(from_log)));
        let mut i = 0;
        while i < n {
            let left = n - i;
            let scaled = S::mul(S::load_some(from.add(i), left), b);
            S::store_some(to.add(i), left, S::fma(S::load_some(to.add(i), left), a, scaled));
            i += S::LANES;
        }
        [S::max_lane(a), S::max_lane(b)]
    }
}
