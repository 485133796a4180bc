//! Attention over a `bf16` cache by `vdpbf16ps`: q and the weights are rounded to `bf16`, sums are `f32`.
//!
//! Products take pairs of values: of neighbouring dimensions for scores, of neighbouring positions for the weighted
//! sum. Pairs of positions are counted in the row's own context, so they are the same wherever the K/V lie.

use super::{
    chunk::{Method, attend_body, fetch},
    partial::Partial,
    work_item::{Item, Run, TILE},
};
use crate::{
    Isa, convert,
    simd::{Simd, avx512::Avx512},
};
use half::bf16;
use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_maskz_loadu_epi16, _mm512_permutex2var_epi16, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_storeu_ps, _mm512_storeu_si512,
};

/// Products of pairs of `bf16`.
struct Pairs;

/// [`super::exact::attend`] in pairs.
///
/// # Safety
/// The processor has AVX-512 BF16, `k.head_dim` is even, and the contract of [`attend_body`] holds.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn attend(_: Isa, item: &Item<'_, bf16>, chunk: usize, part: &mut Partial<'_>, work: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { attend_body::<Pairs>(item, chunk, part, work) };
}

/// Views 512 bits as pairs.
#[inline(always)]
unsafe fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: two views of 512 bits.
    unsafe { std::mem::transmute(bits) }
}

/// Sixteen pairs from anywhere.
#[inline(always)]
unsafe fn load(from: *const f32) -> __m512bh {
    // SAFETY: the caller's promise.
    unsafe { pairs(_mm512_loadu_si512(from.cast())) }
}

/// One pair, sixteen times.
#[inline(always)]
unsafe fn splat(from: *const f32) -> __m512bh {
    // SAFETY: the caller's promise.
    unsafe { pairs(_mm512_set1_epi32(from.cast::<i32>().read_unaligned())) }
}

// SAFETY: `attend` has the features.
unsafe impl Method for Pairs {
    type S = Avx512;
    type E = bf16;

    unsafe fn prepare(item: &Item<'_, bf16>, to: &mut [f32]) {
        let dim = item.views.k.head_dim;
        let mut scaled = [0.0; 64];
        for (index, query) in item.each_query().enumerate() {
            // SAFETY: `to` has room for `dim` floats a query, which `dim / 2` pairs take half of.
            let to = unsafe { std::slice::from_raw_parts_mut(to.as_mut_ptr().add(index * dim).cast::<bf16>(), dim) };
            for (from, to) in query.chunks(scaled.len()).zip(to.chunks_mut(scaled.len())) {
                let scaled = &mut scaled[..from.len()];
                scaled.iter_mut().zip(from).for_each(|(to, from)| *to = from * item.views.params.scale);
                convert::bf16_from_f32(Isa::Avx512, scaled, to);
            }
        }
    }

    #[allow(clippy::cast_ptr_alignment, reason = "vector loads take any alignment")]
    #[inline(always)]
    unsafe fn tile(item: &Item<'_, bf16>, runs: &[Run], end: usize, keys: &mut [f32], values: &mut [f32]) {
        let (k, v) = (item.views.k, item.views.v);
        let mut rows = [std::ptr::null(); TILE];
        for run in runs {
            // SAFETY: the run lies within the cache, its positions within the tile; strides count pairs, so
            // that with an odd one rows go one by one.
            unsafe {
                fetch::<Avx512, bf16>(item, run);
                let to = keys.as_mut_ptr().add(run.at);
                if k.row_stride.is_multiple_of(2) {
                    let from = item.key(run.cache).cast::<f32>();
                    Avx512::transpose::<f32>(from, k.row_stride / 2, run.len, k.head_dim / 2, to, TILE);
                } else {
                    for row in 0..run.len {
                        let from = item.key(run.cache + row).cast::<f32>();
                        Avx512::transpose::<f32>(from, 0, 1, k.head_dim / 2, to.add(row), TILE);
                    }
                }
            }
            for row in 0..run.len {
                rows[run.at + row] = item.value(run.cache + row);
            }
        }
        let width = v.head_dim.next_multiple_of(32);
        for pair in 0..end.div_ceil(2) {
            // SAFETY: rows below `end` are those of V; `values` is `[TILE / 2, width]`.
            unsafe {
                interleave(rows[2 * pair], rows[2 * pair + 1], v.head_dim, values.as_mut_ptr().add(pair * width));
            };
        }
    }

    #[inline(always)]
    unsafe fn score<const R: usize>(q: *const f32, keys: *const f32, dim: usize, columns: usize, to: *mut f32) {
        for column in (0..columns).step_by(64) {
            // SAFETY: the caller's promise; 64 columns divide a tile.
            unsafe {
                let mut sums = [[_mm512_setzero_ps(); 4]; R];
                for pair in 0..dim / 2 {
                    let key = keys.add(pair * TILE + column);
                    let key = [load(key), load(key.add(16)), load(key.add(32)), load(key.add(48))];
                    for r in 0..R {
                        let q = splat(q.add(r * dim + pair));
                        for c in 0..4 {
                            sums[r][c] = _mm512_dpbf16_ps(sums[r][c], q, key[c]);
                        }
                    }
                }
                for r in 0..R {
                    for c in 0..4 {
                        _mm512_storeu_ps(to.add(r * TILE + column + 16 * c), sums[r][c]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn weigh<const R: usize>(
        item: &Item<'_, bf16>,
        _runs: &[Run],
        columns: usize,
        values: &[f32],
        scores: &mut [f32],
        to: *mut f32,
    ) {
        let dim = item.views.v.head_dim;
        let width = dim.next_multiple_of(32);
        // SAFETY: the caller's promise; weights are zero from `columns` to the next multiple of 32.
        unsafe {
            let weights = scores.as_mut_ptr();
            for r in 0..R {
                for column in (0..columns).step_by(32) {
                    // In place: the pairs of a row's positions in the first half of its scores.
                    let from = weights.add(r * TILE + column);
                    let (low, high) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16)));
                    let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                    _mm512_storeu_si512(weights.add(r * TILE + column / 2).cast(), rounded);
                }
            }
            let count = columns.div_ceil(2);
            let mut d = 0;
            while d + 64 <= dim {
                weigh_vectors::<R, 4>(weights, values.as_ptr().add(d), width, count, 64, to.add(d), dim);
                d += 64;
            }
            while d < dim {
                let left = (dim - d).min(16);
                weigh_vectors::<R, 1>(weights, values.as_ptr().add(d), width, count, left, to.add(d), dim);
                d += 16;
            }
        }
    }
}

/// Adds `count` pairs of weighted positions to `V` vectors of `R` rows, the last of which may be short of `left`.
#[inline(always)]
unsafe fn weigh_vectors<const R: usize, const V: usize>(
    weights: *const f32,
    values: *const f32,
    width: usize,
    count: usize,
    left: usize,
    to: *mut f32,
    dim: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        for r in 0..R {
            for c in 0..V {
                sums[r][c] = Avx512::load_some(to.add(r * dim + 16 * c), left - 16 * c);
            }
        }
        for pair in 0..count {
            let value = values.add(pair * width);
            let mut v = [load(value); V];
            for c in 1..V {
                v[c] = load(value.add(16 * c));
            }
            for r in 0..R {
                let weight = splat(weights.add(r * TILE + pair));
                for c in 0..V {
                    sums[r][c] = _mm512_dpbf16_ps(sums[r][c], weight, v[c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..V {
                Avx512::store_some(to.add(r * dim + 16 * c), left - 16 * c, sums[r][c]);
            }
        }
    }
}

/// Writes pairs of a value of `a` and one of `b`; zeros where there is no `b`.
#[inline(always)]
unsafe fn interleave(a: *const bf16, b: *const bf16, dim: usize, to: *mut f32) {
    // SAFETY: the caller's promise: both have `dim` values, `to` room for the next multiple of 32.
    unsafe {
        let low = _mm512_loadu_si512(ORDER.as_ptr().cast());
        let high = _mm512_loadu_si512(ORDER.as_ptr().add(32).cast());
        let zero: __m512i = std::mem::transmute::<__m512, _>(_mm512_setzero_ps());
        for d in (0..dim).step_by(32) {
            let mask = if dim - d >= 32 { u32::MAX } else { (1 << (dim - d)) - 1 };
            let first = _mm512_maskz_loadu_epi16(mask, a.add(d).cast());
            let second = if b.is_null() { zero } else { _mm512_maskz_loadu_epi16(mask, b.add(d).cast()) };
            let (first_16, last_16) =
                (_mm512_permutex2var_epi16(first, low, second), _mm512_permutex2var_epi16(first, high, second));
            _mm512_storeu_ps(to.add(d), _mm512_castsi512_ps(first_16));
            _mm512_storeu_ps(to.add(d + 16), _mm512_castsi512_ps(last_16));
        }
    }
}

/// Value `i` of the first vector, then of the second, for `i` from 0 on.
static ORDER: [u16; 64] = {
    let mut order = [0; 64];
    let mut i = 0;
    while i < 32 {
        order[2 * i] = i as u16;
        order[2 * i + 1] = 32 + i as u16;
        i += 1;
    }
    order
};
