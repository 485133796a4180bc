//! `f32` activations with `f32`, `f16`, `bf16` or 8-bit weights, widened in registers.

use super::{
    Target, Tile,
    tile::{self, Dot, Operands, Place},
};
use crate::simd::{Element, Simd, kernel};
use std::marker::PhantomData;

kernel! {
    pub(super) fn block<W: Element> = block_body(
        x: *const f32, stride: usize, weight: *const W, scales: Option<&[f32]>, k: usize, tile: Tile, bias: Option<&[f32]>,
        to: Target,
    )
}

/// `x`, `weight` and `scales` of weights, where they have one a row, start at the tile's first row and column.
///
/// # Safety
/// As for [`tile::multiply`].
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the operands of one product")]
unsafe fn block_body<S: Simd, W: Element>(
    x: *const f32,
    stride: usize,
    weight: *const W,
    scales: Option<&[f32]>,
    k: usize,
    tile: Tile,
    bias: Option<&[f32]>,
    to: Target,
) {
    let dot = Widened::<S, W> { scales, of: PhantomData };
    // SAFETY: the caller's promise.
    unsafe { tile::multiply(Operands { dot, x, stride, w: weight, k, bias, to }, tile) };
}

/// Products of `f32` with weights widened to it.
#[derive(Clone, Copy)]
struct Widened<'a, S, W> {
    /// From the tile's first column on.
    scales: Option<&'a [f32]>,
    of: PhantomData<(S, W)>,
}

// SAFETY: passes the contract on.
unsafe impl<S: Simd, W: Element> Dot for Widened<'_, S, W> {
    type X = f32;
    type W = W;
    type V = S::V;
    type Sums = S::V;
    type Start = ();
    const STEP: usize = S::LANES;
    const ROWS: usize = S::TILE_ROWS;
    const BLOCK: usize = 640;

    #[inline(always)]
    unsafe fn zero() -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::zero() }
    }
    #[inline(always)]
    unsafe fn start(self, _: Place<W>) {}
    #[inline(always)]
    unsafe fn load_x(from: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load(from) }
    }
    #[inline(always)]
    unsafe fn load_x_n(from: *const f32, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_n(from, n) }
    }
    #[inline(always)]
    unsafe fn load_w(from: *const W) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { W::load::<S>(from) }
    }
    #[inline(always)]
    unsafe fn load_w_n(from: *const W, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { W::load_n::<S>(from, n) }
    }
    #[inline(always)]
    unsafe fn add_product(sums: S::V, x: S::V, w: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::fma(x, w, sums) }
    }
    #[inline(always)]
    unsafe fn finish(self, place: Place<W>, (): (), sums: [S::V; 4]) -> [f32; 4] {
        // SAFETY: the caller's promise.
        let mut sums = unsafe { S::sum4(sums) };
        if let Some(scales) = self.scales {
            for (sum, scale) in sums.iter_mut().zip(&scales[place.column..]) {
                *sum *= scale;
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const W) {
        // SAFETY: the caller's promise.
        unsafe { S::prefetch(at) }
    }
}
