use super::{AttentionParams, KvBits, PackedKv, PackedKvMut, Segment, Span, packed_store::LEVELS};
use crate::{
    Cpu, FloatsRef, Isa, KvRef, Precision,
    testing::{close, cpus, random, same},
};
use half::f16;

/// A cache of integers, and the floats that it means.
struct Cache {
    values: [Vec<i8>; 2],
    scales: [Vec<f16>; 2],
    positions: usize,
    dim: usize,
    bits: KvBits,
}

impl Cache {
    fn new(cpu: &Cpu, heads: usize, positions: usize, dim: usize, bits: KvBits) -> Self {
        let row = bits.row_bytes(dim);
        let mut cache = Self {
            values: [(); 2].map(|()| vec![0; heads * positions * row]),
            scales: [(); 2].map(|()| vec![f16::ZERO; heads * positions]),
            positions,
            dim,
            bits,
        };
        for (nth, (values, scales)) in cache.values.iter_mut().zip(&mut cache.scales).enumerate() {
            let mut to = PackedKvMut { values, scales, positions, head_dim: dim, bits };
            cpu.store_packed(&random(nth as u64 + 1, positions * heads * dim), heads, &mut to, 0);
        }
        cache
    }

    fn view(&self, nth: usize) -> PackedKv<'_> {
        let (values, scales) = (&self.values[nth], &self.scales[nth]);
        PackedKv { values, scales, positions: self.positions, head_dim: self.dim, bits: self.bits }
    }

    /// `[heads, positions, dim]`, the rotation undone.
    fn floats(&self, nth: usize) -> Vec<f32> {
        let row = self.bits.row_bytes(self.dim);
        let mut out = Vec::new();
        for (bytes, scale) in self.values[nth].chunks(row).zip(&self.scales[nth]) {
            let level = |d: usize| match self.bits {
                KvBits::Eight => bytes[d],
                KvBits::Four if d < row => LEVELS[usize::from(bytes[d].cast_unsigned() & 15)],
                KvBits::Four => LEVELS[usize::from(bytes[d - row].cast_unsigned() >> 4)],
            };
            out.extend((0..self.dim).map(|d| f32::from(level(d)) * scale.to_f32()));
        }
        Cpu::new(Isa::Scalar, 1).hadamard(&mut out, self.dim);
        out
    }
}

fn params(heads: usize, group: usize, dim: usize) -> AttentionParams {
    AttentionParams {
        num_attention_heads: heads * group,
        num_key_value_heads: heads,
        scale: 3.0 / (dim as f32).sqrt(),
        softcap: None,
        sliding_window: None,
        precision: Precision::Exact,
    }
}

/// A row is off by half a step of 8 bits, and by what sixteen levels of a normal distribution lose (0.0095 of the energy; a
/// short row that is not normal loses other shares). Every instruction set stores the same bits.
#[test]
fn rows_keep_their_values() {
    let (heads, positions) = (2, 30);
    for dim in [1, 6, 16, 64, 80, 96, 99, 128] {
        for (bits, share) in [(KvBits::Eight, 1e-4), (KvBits::Four, 0.014)] {
            let scalar = Cache::new(&Cpu::new(Isa::Scalar, 1), heads, positions, dim, bits);
            for nth in 0..2 {
                let source = random(nth as u64 + 1, positions * heads * dim);
                let (mut error, mut energy) = (0.0, 0.0);
                for (at, found) in scalar.floats(nth).iter().enumerate() {
                    let (head, position, d) = (at / dim / positions, at / dim % positions, at % dim);
                    let expected = source[(position * heads + head) * dim + d];
                    error += f64::from(found - expected).powi(2);
                    energy += f64::from(expected).powi(2);
                }
                assert!(error < share * energy, "{dim} {bits:?} {}", error / energy);
            }
            for cpu in cpus() {
                let other = Cache::new(&cpu, heads, positions, dim, bits);
                assert!(other.values == scalar.values && other.scales == scalar.scales, "{cpu:?} {dim} {bits:?}");
            }
        }
    }
}

#[test]
fn rows_without_a_scale() {
    for bits in [KvBits::Eight, KvBits::Four] {
        for (x, expected) in [(0.0, 0.0), (f32::MIN_POSITIVE, 0.0)] {
            let (mut values, mut scales) = (vec![0; 16], vec![f16::ZERO; 1]);
            let mut to = PackedKvMut { values: &mut values, scales: &mut scales, positions: 1, head_dim: 16, bits };
            Cpu::new(Isa::Scalar, 1).store_packed(&[x; 16], 1, &mut to, 0);
            assert_eq!(scales[0].to_f32(), expected, "{bits:?} {x}");
        }
    }
}

/// Every tier against the exact attention to the floats that the integers mean: sums of the same values in another order.
#[test]
fn attention_is_that_of_the_floats() {
    for (heads, group, dim, rows) in [(2, 3, 64, 300), (1, 2, 80, 40), (3, 1, 6, 50), (1, 4, 99, 20), (1, 9, 128, 9)] {
        for bits in [KvBits::Eight, KvBits::Four] {
            let scalar = Cpu::new(Isa::Scalar, 1);
            let cache = Cache::new(&scalar, heads, rows + 20, dim, bits);
            let floats = [cache.floats(0), cache.floats(1)];
            let view = |nth: usize| KvRef {
                data: FloatsRef::F32(&floats[nth]),
                head_stride: (rows + 20) * dim,
                row_stride: dim,
                head_dim: dim,
            };
            let prefix = [Span { start: rows + 10, len: 7 }, Span { start: 2, len: 3 }];
            let segments = [Segment { q_start: 0, q_len: rows - 3, prefix: &prefix, own_start: 5 }];
            let mut params = params(heads, group, dim);
            for (softcap, sliding_window) in [(None, None), (Some(4.0), Some(33))] {
                (params.softcap, params.sliding_window) = (softcap, sliding_window);
                let q = random(5, (rows - 3) * heads * group * dim);
                let mut expected = vec![0.0; q.len()];
                scalar.attention(&params, &q, view(0), view(1), &segments, &mut expected);
                let expected: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
                for cpu in cpus() {
                    let mut out = vec![f32::NAN; q.len()];
                    cpu.attention_packed(&params, &q, cache.view(0), cache.view(1), &segments, &mut out);
                    close(&format!("{cpu:?} {dim} {bits:?}"), &out, &expected, 1e-5);
                }
            }
        }
    }
}

/// One prefill, pieces of it and decode steps give the same bits, with any number of threads.
#[test]
fn bits_do_not_depend_on_the_cut() {
    let (heads, group, dim, rows) = (2, 3, 64, 400);
    let params = params(heads, group, dim);
    let q = random(5, rows * heads * group * dim);
    let width = heads * group * dim;
    for isa in Isa::available() {
        for bits in [KvBits::Eight, KvBits::Four] {
            let cpu = Cpu::new(isa, 2);
            let cache = Cache::new(&cpu, heads, rows, dim, bits);
            let run = |cpu: &Cpu, first: usize, len: usize| {
                let prefix = [Span { start: 0, len: first / 2 }, Span { start: first / 2, len: first - first / 2 }];
                let segment = Segment { q_start: 0, q_len: len, prefix: &prefix, own_start: first };
                let mut out = vec![f32::NAN; len * width];
                let q = &q[first * width..][..len * width];
                cpu.attention_packed(&params, q, cache.view(0), cache.view(1), &[segment], &mut out);
                out
            };
            let whole = run(&Cpu::new(isa, 1), 0, rows);
            same("threads", &run(&cpu, 0, rows), &whole);
            for (first, len) in [(0, 1), (100, 77), (255, 2), (399, 1)] {
                same(
                    &format!("{isa} {bits:?} {first}"),
                    &run(&cpu, first, len),
                    &whole[first * width..][..len * width],
                );
            }
        }
    }
}

#[test]
#[should_panic(expected = "outside of the cache")]
fn reading_outside_of_the_cache_panics() {
    let cpu = Cpu::new(Isa::Scalar, 1);
    let cache = Cache::new(&cpu, 1, 10, 8, KvBits::Four);
    let segment = Segment { q_start: 0, q_len: 11, prefix: &[], own_start: 0 };
    let mut out = vec![0.0; 11 * 8];
    cpu.attention_packed(&params(1, 1, 8), &random(5, 88), cache.view(0), cache.view(1), &[segment], &mut out);
}
