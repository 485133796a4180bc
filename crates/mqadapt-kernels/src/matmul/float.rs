//! `f32` activations with `f32`, `f16` or `bf16` weights, widened in registers.

use super::{
    Target, Tile,
    tile::{self, Dot, Operands},
};
use crate::simd::{Element, Simd, kernel};
use std::marker::PhantomData;

kernel! {
    pub(super) fn block<W: Element> = block_body(
        x: *const f32, stride: usize, weight: *const W, k: usize, tile: Tile, bias: Option<&[f32]>, to: Target,
    )
}

/// `x` and `weight` point at the tile's first row and column.
///
/// # Safety
/// As for [`tile::multiply`].
#[inline(always)]
unsafe fn block_body<S: Simd, W: Element>(
    x: *const f32,
    stride: usize,
    weight: *const W,
    k: usize,
    tile: Tile,
    bias: Option<&[f32]>,
    to: Target,
) {
    // SAFETY: the caller's promise.
    unsafe { tile::multiply(Operands::<Widened<S, W>> { x, stride, w: weight, k, bias, to }, tile) };
}

/// Products of `f32` with weights widened to it.
struct Widened<S, W>(PhantomData<(S, W)>);

// SAFETY: passes the contract on.
unsafe impl<S: Simd, W: Element> Dot for Widened<S, W> {
    type X = f32;
    type W = W;
    type V = S::V;
    type Sums = S::V;
    const STEP: usize = S::LANES;
    const ROWS: usize = S::TILE_ROWS;
    const BLOCK: usize = 640;

    #[inline(always)]
    unsafe fn zero() -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::zero() }
    }
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
    unsafe fn sum4(sums: [S::V; 4]) -> [f32; 4] {
        // SAFETY: the caller's promise.
        unsafe { S::sum4(sums) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const W) {
        // SAFETY: the caller's promise.
        unsafe { S::prefetch(at) }
    }
}
