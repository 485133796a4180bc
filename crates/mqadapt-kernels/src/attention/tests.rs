use super::{AttentionParams, KvMut, KvRef, Segment, Span};
use crate::{
    Cpu, FloatsMut, FloatsRef, Isa, Precision,
    testing::{Stored, close, cpus, random, same},
};
use half::bf16;
use proptest::prelude::*;

/// A layer's shape and the content of a cache.
struct Case {
    params: AttentionParams,
    k_dim: usize,
    v_dim: usize,
    capacity: usize,
    k: Stored,
    v: Stored,
}

impl Case {
    fn new(kv_heads: usize, group: usize, k_dim: usize, v_dim: usize, capacity: usize) -> Self {
        let params = AttentionParams {
            num_attention_heads: kv_heads * group,
            num_key_value_heads: kv_heads,
            scale: 3.0 / (k_dim as f32).sqrt(),
            softcap: None,
            sliding_window: None,
            precision: Precision::Exact,
        };
        let k = Stored::random(1, kv_heads * capacity * k_dim);
        let v = Stored::random(2, kv_heads * capacity * v_dim);
        Self { params, k_dim, v_dim, capacity, k, v }
    }

    fn view<'a>(&self, data: FloatsRef<'a>, head_dim: usize) -> KvRef<'a> {
        KvRef { data, head_stride: self.capacity * head_dim, row_stride: head_dim, head_dim }
    }

    fn q(&self, rows: usize) -> Vec<f32> {
        random(3, rows * self.params.num_attention_heads * self.k_dim)
    }

    /// Runs on dtype number `dtype`.
    fn run(&self, cpu: &Cpu, dtype: usize, q: &[f32], segments: &[Segment<'_>]) -> Vec<f32> {
        let k = self.view(self.k.floats()[dtype].0, self.k_dim);
        let v = self.view(self.v.floats()[dtype].0, self.v_dim);
        let mut out = vec![f32::NAN; q.len() / self.k_dim * self.v_dim];
        cpu.attention(&self.params, q, k, v, segments, &mut out);
        out
    }

    /// In `f64`, a list of cache positions at a time.
    fn naive(&self, dtype: usize, q: &[f32], segments: &[Segment<'_>]) -> Vec<f64> {
        let (k, v) = (&self.k.floats()[dtype].1, &self.v.floats()[dtype].1);
        let heads = self.params.num_attention_heads;
        let group = heads / self.params.num_key_value_heads;
        let mut out = vec![f64::NAN; q.len() / self.k_dim * self.v_dim];
        for segment in segments {
            for row in 0..segment.q_len {
                let own = Span { start: segment.own_start, len: row + 1 };
                let spans = segment.prefix.iter().chain([&own]);
                let mut positions: Vec<_> = spans.flat_map(|span| span.start..span.start + span.len).collect();
                if let Some(window) = self.params.sliding_window {
                    positions.drain(..positions.len().saturating_sub(window));
                }
                for head in 0..heads {
                    let base = head / group * self.capacity;
                    let at = (segment.q_start + row) * heads + head;
                    let q = &q[at * self.k_dim..][..self.k_dim];
                    let scores = positions.iter().map(|position| {
                        let k = &k[(base + position) * self.k_dim..][..self.k_dim];
                        let score = q.iter().zip(k).map(|(q, k)| f64::from(*q) * k).sum::<f64>();
                        let score = score * f64::from(self.params.scale);
                        self.params.softcap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh())
                    });
                    let weights: Vec<_> = scores.map(f64::exp).collect();
                    let sum: f64 = weights.iter().sum();
                    for d in 0..self.v_dim {
                        let values = positions.iter().map(|position| v[(base + position) * self.v_dim + d]);
                        let value: f64 = values.zip(&weights).map(|(value, weight)| value * weight).sum();
                        out[at * self.v_dim + d] = value / sum;
                    }
                }
            }
        }
        out
    }

    /// Every tier and dtype against `f64`: sums of values below 1 with weights that sum to 1, scores off by 1e-6.
    fn check(&mut self, segments: &[Segment<'_>]) {
        let rows = segments.iter().map(|segment| segment.q_start + segment.q_len).max().unwrap_or(0);
        let q = self.q(rows);
        for dtype in 0..3 {
            let expected = self.naive(dtype, &q, segments);
            for cpu in cpus() {
                self.params.precision = Precision::Exact;
                close(&format!("{cpu:?} dtype {dtype}"), &self.run(&cpu, dtype, &q, segments), &expected, 5e-6);
                // q and the probabilities have 8 bits: scores are off by up to 2^-9 of their size (below 3 here), values by as much.
                self.params.precision = Precision::Fast;
                close(&format!("{cpu:?} fast {dtype}"), &self.run(&cpu, dtype, &q, segments), &expected, 2e-2);
            }
        }
        self.params.precision = Precision::Exact;
    }
}

fn whole(q_len: usize) -> Segment<'static> {
    Segment { q_start: 0, q_len, prefix: &[], own_start: 0 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape(
        kv_heads in 1usize..4,
        group in 1usize..6,
        k_dim in 1usize..100,
        v_dim in 1usize..100,
        rows in 1usize..40,
        past in 0usize..300,
        window in proptest::option::of(1usize..200),
        softcap in proptest::option::of(1f32..50.0),
    ) {
        let mut case = Case::new(kv_heads, group, k_dim, v_dim, past + rows + 3);
        (case.params.sliding_window, case.params.softcap) = (window, softcap);
        case.check(&[Segment { q_start: 0, q_len: rows, prefix: &[Span { start: 0, len: past }], own_start: past + 2 }]);
    }
}

#[test]
fn real_head_dims() {
    for (kv_heads, group, dim) in [(3, 3, 64), (1, 9, 64), (1, 4, 256), (2, 4, 128), (2, 1, 8), (1, 71, 64), (2, 2, 80)]
    {
        Case::new(kv_heads, group, dim, dim, 150).check(&[whole(150)]);
        let decode = Segment { q_start: 0, q_len: 1, prefix: &[Span { start: 0, len: 149 }], own_start: 149 };
        Case::new(kv_heads, group, dim, dim, 150).check(&[decode]);
    }
}

/// A trie: a root, two children that share it, a grandchild; their K/V scattered over the cache.
#[test]
fn segments_share_prefixes() {
    let mut case = Case::new(2, 3, 24, 40, 900);
    let (root, child) = (Span { start: 500, len: 300 }, Span { start: 40, len: 17 });
    let segments = [
        Segment { q_start: 0, q_len: 300, prefix: &[], own_start: 500 },
        Segment { q_start: 300, q_len: 17, prefix: &[root], own_start: 40 },
        Segment { q_start: 317, q_len: 30, prefix: &[root], own_start: 60 },
        Segment { q_start: 347, q_len: 5, prefix: &[root, child], own_start: 0 },
    ];
    case.check(&segments);
    case.params.sliding_window = Some(20);
    case.check(&segments);
}

/// The same tokens give the same bits as one prefill, as decode steps, and as a trie's segments.
#[test]
fn bits_do_not_depend_on_the_cut() {
    let rows = 600;
    for precision in [Precision::Exact, Precision::Fast] {
        let mut case = Case::new(2, 3, 64, 64, rows);
        for window in [None, Some(270)] {
            (case.params.precision, case.params.sliding_window) = (precision, window);
            let q = case.q(rows);
            let q_row = q.len() / rows;
            for isa in Isa::available() {
                for dtype in 0..3 {
                    let expected = case.run(&Cpu::new(isa, 1), dtype, &q, &[whole(rows)]);
                    let cpu = Cpu::new(isa, 2);
                    let what = format!("{isa} {precision:?} {window:?} dtype {dtype}");
                    same(&what, &case.run(&cpu, dtype, &q, &[whole(rows)]), &expected);
                    let spans =
                        [Span { start: 0, len: 255 }, Span { start: 255, len: 58 }, Span { start: 313, len: 200 }];
                    let segments: Vec<_> = (0..4)
                        .map(|nth| {
                            let start = spans[..nth].iter().map(|span| span.len).sum();
                            let q_len = spans.get(nth).map_or(rows - start, |span| span.len);
                            Segment { q_start: start, q_len, prefix: &spans[..nth], own_start: start }
                        })
                        .collect();
                    same(&what, &case.run(&cpu, dtype, &q, &segments), &expected);
                    for row in [0, 127, 128, 300, 599] {
                        let prefix = [Span { start: 0, len: row }];
                        let step = Segment { q_start: 0, q_len: 1, prefix: &prefix, own_start: row };
                        let out = case.run(&cpu, dtype, &q[row * q_row..][..q_row], &[step]);
                        same(&what, &out, &expected[row * q_row..][..q_row]);
                    }
                }
            }
        }
    }
}

#[test]
fn stores_rows_in_the_cache_dtype() {
    let (heads, dim, capacity, start, rows) = (3, 10, 20, 7, 12);
    let src = random(1, rows * heads * dim);
    for cpu in cpus() {
        let mut cache = vec![bf16::ZERO; heads * capacity * dim];
        let data = FloatsMut::Bf16(&mut cache);
        let mut kv = KvMut { data, head_stride: capacity * dim, row_stride: dim, head_dim: dim };
        cpu.store_kv(&src, heads, &mut kv, start);
        for (at, value) in cache.iter().enumerate() {
            let (head, position, d) = (at / dim / capacity, at / dim % capacity, at % dim);
            let row = position.wrapping_sub(start);
            let expected = if row < rows { src[(row * heads + head) * dim + d] } else { 0.0 };
            assert_eq!(*value, bf16::from_f32(expected));
        }
    }
}

#[test]
#[should_panic(expected = "outside of the cache")]
fn reading_outside_of_the_cache_panics() {
    let case = Case::new(1, 1, 8, 8, 10);
    case.run(&Cpu::new(Isa::Scalar, 1), 0, &case.q(11), &[whole(11)]);
}
