//! Every kernel in the shapes of SmolLM2-135M, as GB/s and GFLOP/s beside what this machine can do.
//!
//! `cargo bench -p mqadapt-kernels`; `MQADAPT_ISA` and `MQADAPT_NUM_THREADS` choose as everywhere. Criterion keeps the
//! statistics; the table at the end takes each kernel's best sample.

use criterion::{Criterion, Throughput};
use half::bf16;
use mqadapt_kernels::{
    Activation, AttentionParams, Cpu, FloatsMut, FloatsRef, Int8Weights, Isa, KvRef, MatmulOut, Precision, RopeTables,
    RowScore, ScoreHead, Segment, Span, Store, WeightsRef,
};
use std::{cell::RefCell, hint::black_box, time::Duration, time::Instant};

const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const HEADS: usize = 9;
const HEAD_DIM: usize = 64;
const VOCAB: usize = 49152;
/// Distinct weights in turn, so that a decode step reads memory, not a cache.
const LAYERS: usize = 30;

fn main() {
    let cpu = Cpu::global();
    let suite = Suite::new(cpu);
    products(&suite);
    decode(&suite);
    attention(&suite);
    scoring(&suite);
    rows(&suite);
    conversions(&suite);
    suite.table();
}

/// Runs benches and remembers the best time of each.
struct Suite<'a> {
    cpu: &'a Cpu,
    criterion: RefCell<Criterion>,
    results: RefCell<Vec<Measured>>,
}

struct Measured {
    name: String,
    flops: f64,
    bytes: f64,
    seconds: f64,
}

impl<'a> Suite<'a> {
    fn new(cpu: &'a Cpu) -> Self {
        let criterion = Criterion::default()
            .sample_size(10)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(800))
            .configure_from_args();
        Self { cpu, criterion: RefCell::new(criterion), results: RefCell::default() }
    }

    /// Times `routine`, which does `flops` operations on `bytes` of memory.
    fn bench(&self, name: &str, flops: usize, bytes: usize, mut routine: impl FnMut()) {
        let mut best = f64::INFINITY;
        let mut criterion = self.criterion.borrow_mut();
        let mut group = criterion.benchmark_group("kernels");
        group.throughput(Throughput::ElementsAndBytes { elements: flops as u64, bytes: bytes as u64 });
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let mut total = Duration::ZERO;
                for _ in 0..iterations {
                    let start = Instant::now();
                    routine();
                    let took = start.elapsed();
                    best = best.min(took.as_secs_f64());
                    total += took;
                }
                total
            });
        });
        group.finish();
        if best.is_finite() {
            let (flops, bytes) = (flops as f64, bytes as f64);
            self.results.borrow_mut().push(Measured { name: name.to_owned(), flops, bytes, seconds: best });
        }
    }

    fn table(&self) {
        let read = limits::read(self.cpu);
        let [single, half, byte] = limits::flops(self.cpu);
        println!("\n{:?}", self.cpu);
        println!(
            "limits: read {:.1} GB/s, f32 {:.0} GFLOP/s, bf16 {:.0} GFLOP/s, int8 {:.0} GOP/s",
            read / 1e9,
            single / 1e9,
            half / 1e9,
            byte / 1e9
        );
        println!("{:<40} {:>10} {:>9} {:>7} {:>9} {:>7}", "kernel", "time us", "GB/s", "of read", "GFLOP/s", "of peak");
        for Measured { name, flops, bytes, seconds } in &*self.results.borrow() {
            let peak = match name {
                _ if name.ends_with("int8 fast") => byte,
                _ if name.ends_with("fast") => half,
                _ => single,
            };
            println!(
                "{name:<40} {:>10.1} {:>9.1} {:>6.0}% {:>9.1} {:>6.0}%",
                seconds * 1e6,
                bytes / seconds / 1e9,
                100.0 * bytes / seconds / read,
                flops / seconds / 1e9,
                100.0 * flops / seconds / peak,
            );
        }
    }
}

/// Evenly spread values in -1..1.
fn random(len: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn random_bf16(len: usize) -> Vec<bf16> {
    random(len).into_iter().map(bf16::from_f32).collect()
}

/// Prefill of 512 tokens: the products of one layer.
fn products(suite: &Suite<'_>) {
    let m = 512;
    let shapes = [("q, k, v", 960, HIDDEN), ("o", HIDDEN, HIDDEN), ("gate, up", 2 * INTERMEDIATE, HIDDEN)];
    for (name, n, k) in shapes.into_iter().chain([("down", HIDDEN, INTERMEDIATE), ("4096", 4096, 4096)]) {
        let (x, single, half) = (random(m * k), random(n * k), random_bf16(n * k));
        let (bytes, scales): (Vec<i8>, _) = (single.iter().map(|x| (x * 127.0) as i8).collect(), vec![1.0; n]);
        let mut out = vec![0.0; m * n];
        for (dtype, weights, precision) in [
            ("int8 fast", WeightsRef::Int8(Int8Weights { values: &bytes, scales: &scales }), Precision::Fast),
            ("bf16 fast", WeightsRef::Bf16(&half), Precision::Fast),
            ("bf16 exact", WeightsRef::Bf16(&half), Precision::Exact),
            ("f32 exact", WeightsRef::F32(&single), Precision::Exact),
        ] {
            suite.bench(&format!("prefill 512 {name} {dtype}"), 2 * m * n * k, weights.bytes(), || {
                let product = MatmulOut::new(weights, &mut out);
                suite.cpu.matmul_nt(&x, m, k, &mut [product], precision, Store::Overwrite);
            });
        }
    }
}

/// One token: all weights of the model, read once.
fn decode(suite: &Suite<'_>) {
    let per_layer = 2 * HIDDEN * HIDDEN + 2 * 192 * HIDDEN + 3 * INTERMEDIATE * HIDDEN;
    let weights = random_bf16(LAYERS * per_layer + VOCAB * HIDDEN);
    let (x, mut out, mut between) = (random(INTERMEDIATE), vec![0.0; VOCAB], vec![0.0; INTERMEDIATE]);
    for (name, precision) in
        [("decode weights bf16 exact", Precision::Exact), ("decode weights bf16 fast", Precision::Fast)]
    {
        suite.bench(name, 2 * weights.len(), 2 * weights.len(), || {
            let mut rest = &weights[..];
            let mut take = |n: usize, k: usize| {
                let (first, others) = rest.split_at(n * k);
                rest = others;
                WeightsRef::Bf16(first)
            };
            let (cpu, act) = (suite.cpu, Activation::Silu);
            let mut product = |weights: WeightsRef<'_>, n: usize, k: usize| {
                let product = MatmulOut::new(weights, &mut out[..n]);
                cpu.matmul_nt(&x[..k], 1, k, &mut [product], precision, Store::Overwrite);
            };
            for _ in 0..LAYERS {
                product(take(960, HIDDEN), 960, HIDDEN);
                product(take(HIDDEN, HIDDEN), HIDDEN, HIDDEN);
                let (gate, up) = (take(INTERMEDIATE, HIDDEN), take(INTERMEDIATE, HIDDEN));
                let x = &x[..HIDDEN];
                cpu.matmul_nt_gated(x, 1, HIDDEN, gate.into(), up.into(), act, &mut between, precision);
                product(take(HIDDEN, INTERMEDIATE), HIDDEN, INTERMEDIATE);
            }
            product(take(VOCAB, HIDDEN), VOCAB, HIDDEN);
        });
    }
}

/// Prefill of one layer, and decode steps through all layers' caches, as GQA and as MQA.
fn attention(suite: &Suite<'_>) {
    for kv_heads in [3, 1] {
        for (rows, past) in [(512, 0), (2048, 0), (1, 64), (1, 2048), (1, 8192)] {
            let (layers, capacity) = (if rows == 1 { LAYERS } else { 1 }, rows + past);
            let layer_len = kv_heads * capacity * HEAD_DIM;
            let (q, k, v) =
                (random(rows * HEADS * HEAD_DIM), random_bf16(layers * layer_len), random_bf16(layers * layer_len));
            let mut out = vec![0.0; q.len()];
            let prefix = [Span { start: 0, len: past }];
            let segment = Segment { q_start: 0, q_len: rows, prefix: &prefix, own_start: past };
            let attended: usize = (0..rows).map(|row| past + row + 1).sum();
            for (name, precision) in [("exact", Precision::Exact), ("fast", Precision::Fast)] {
                let params = AttentionParams {
                    num_attention_heads: HEADS,
                    num_key_value_heads: kv_heads,
                    scale: 0.125,
                    softcap: None,
                    sliding_window: None,
                    precision,
                };
                let what = if rows == 1 { format!("decode at {past}") } else { format!("prefill {rows}") };
                let name = format!("attention {what}, {kv_heads} K/V heads, bf16 {name}");
                let (flops, bytes) = (layers * 4 * attended * HEADS * HEAD_DIM, layers * layer_len * 4);
                suite.bench(&name, flops, bytes, || {
                    for (k, v) in k.chunks_exact(layer_len).zip(v.chunks_exact(layer_len)) {
                        let view = |data| KvRef {
                            data,
                            head_stride: capacity * HEAD_DIM,
                            row_stride: HEAD_DIM,
                            head_dim: HEAD_DIM,
                        };
                        let (k, v) = (view(FloatsRef::Bf16(k)), view(FloatsRef::Bf16(v)));
                        suite.cpu.attention(&params, &q, k, v, &[segment], &mut out);
                    }
                });
            }
        }
    }
}

/// The output head on a few scored rows.
fn scoring(suite: &Suite<'_>) {
    let lm_head = random_bf16(VOCAB * HIDDEN);
    for rows in [1, 64] {
        let hidden = random(rows * HIDDEN);
        let targets: Vec<u32> = (0..rows as u32).collect();
        let target_starts: Vec<usize> = (0..=rows).collect();
        let (mut scores, mut logits) = (vec![RowScore::default(); rows], vec![0.0; rows]);
        let head = ScoreHead {
            lm_head: WeightsRef::Bf16(&lm_head),
            hidden_size: HIDDEN,
            softcap: None,
            precision: Precision::Fast,
            targets: &targets,
            target_starts: &target_starts,
        };
        suite.bench(&format!("score {rows} rows fast"), 2 * rows * lm_head.len(), 2 * lm_head.len(), || {
            suite.cpu.score_head(&head, &hidden, &mut scores, &mut logits);
        });
    }
}

/// What runs between the products, on 512 rows.
fn rows(suite: &Suite<'_>) {
    let m = 512;
    let (x, weight) = (random(m * HIDDEN), random(HIDDEN));
    let mut out = vec![0.0; m * HIDDEN];
    suite.bench("rms_norm 512", 4 * x.len(), 8 * x.len(), || suite.cpu.rms_norm(&x, &weight, 0.0, 1e-5, &mut out));
    let tables = random(m * HEAD_DIM / 2);
    let positions: Vec<u32> = (0..m as u32).collect();
    suite.bench("rope 512", 3 * x.len(), 8 * x.len(), || {
        let tables = RopeTables { cos: &tables, sin: &tables, rotary_dim: HEAD_DIM };
        suite.cpu.rope(&mut out, HEADS, HEAD_DIM, &positions, tables);
    });
    let (gate, mut out) = (random(m * INTERMEDIATE), vec![0.0; m * INTERMEDIATE]);
    for activation in [Activation::Silu, Activation::GeluTanh] {
        suite.bench(&format!("{activation:?} gate 512"), 20 * gate.len(), 12 * gate.len(), || {
            suite.cpu.gate(activation, &gate, &gate, &mut out);
        });
    }
}

fn conversions(suite: &Suite<'_>) {
    let len = 32 << 20;
    let (single, half) = (random(len), random_bf16(len));
    let mut narrow = vec![bf16::ZERO; len];
    suite.bench("f32 to bf16", 0, 6 * len, || {
        black_box(suite.cpu.convert(FloatsRef::F32(&single), FloatsMut::Bf16(&mut narrow)));
    });
    let mut narrow = vec![half::f16::ZERO; len];
    suite.bench("f32 to f16", 0, 6 * len, || {
        black_box(suite.cpu.convert(FloatsRef::F32(&single), FloatsMut::F16(&mut narrow)));
    });
    suite.bench("bf16 to f16", 0, 4 * len, || {
        black_box(suite.cpu.convert(FloatsRef::Bf16(&half), FloatsMut::F16(&mut narrow)));
    });
    let mut wide = single;
    suite.bench("bf16 to f32", 0, 6 * len, || {
        black_box(suite.cpu.convert(FloatsRef::Bf16(&half), FloatsMut::F32(&mut wide)));
    });
}

/// What the machine can do with the same threads.
mod limits {
    use super::{Cpu, Instant, Isa, black_box};

    /// The best rate of five runs of `routine`, which does `work`.
    fn best(work: f64, mut routine: impl FnMut()) -> f64 {
        let mut rate = 0f64;
        for _ in 0..5 {
            let start = Instant::now();
            routine();
            rate = rate.max(work / start.elapsed().as_secs_f64());
        }
        rate
    }

    /// Bytes a second, read in order.
    pub fn read(cpu: &Cpu) -> f64 {
        let words = vec![1u64; 64 << 20];
        let parts: Vec<_> = words.chunks(64 << 10).collect();
        best(8.0 * words.len() as f64, || {
            cpu.parallel(parts.len(), |part| {
                black_box(parts[part].iter().fold(0, |sum, word| sum ^ word));
            });
        })
    }

    /// `f32`, `bf16` and `int8` operations a second, from registers; what the instruction set lacks counts as `f32`.
    pub fn flops(cpu: &Cpu) -> [f64; 3] {
        const STEPS: usize = 1 << 20;
        let run = |per_step: usize, burn: unsafe fn(usize)| {
            let work = (cpu.threads() * STEPS * per_step) as f64;
            // SAFETY: `cpu` holds only an available instruction set.
            best(work, || cpu.parallel(cpu.threads(), |_| unsafe { burn(STEPS) }))
        };
        match cpu.isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => [run(24 * 32, x86::fma_512), run(24 * 64, x86::dot_512), run(24 * 128, x86::fours_512)],
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => [run(24 * 32, x86::fma_512); 3],
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => [run(12 * 16, x86::fma_256); 3],
            _ => [run(16, plain); 3],
        }
    }

    unsafe fn plain(steps: usize) {
        let mut sums = [black_box(1f32); 8];
        for _ in 0..steps {
            sums = sums.map(|sum| sum * black_box(0.5) + 1.0);
        }
        black_box(sums);
    }

    #[cfg(target_arch = "x86_64")]
    mod x86 {
        use super::black_box;
        use std::arch::{
            asm,
            x86_64::{
                _mm256_fmadd_ps, _mm256_set1_ps, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps,
                _mm512_set1_epi32, _mm512_set1_ps,
            },
        };

        #[target_feature(enable = "avx2,fma")]
        pub fn fma_256(steps: usize) {
            let (mut sums, x) = ([_mm256_set1_ps(0.0); 12], _mm256_set1_ps(black_box(0.5)));
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(*sum, x, x);
                }
                // SAFETY: no instruction; keeps the loop.
                unsafe { asm!("/* {0} */", in(ymm_reg) sums[0]) };
            }
            black_box(sums);
        }

        #[target_feature(enable = "avx512f")]
        pub fn fma_512(steps: usize) {
            let (mut sums, x) = ([_mm512_set1_ps(0.0); 24], _mm512_set1_ps(black_box(0.5)));
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(*sum, x, x);
                }
                // SAFETY: no instruction; keeps the loop.
                unsafe { asm!("/* {0} */", in(zmm_reg) sums[0]) };
            }
            black_box(sums);
        }

        #[target_feature(enable = "avx512f,avx512bf16")]
        pub fn dot_512(steps: usize) {
            // SAFETY: two views of 512 bits.
            let x = unsafe {
                std::mem::transmute::<std::arch::x86_64::__m512i, std::arch::x86_64::__m512bh>(_mm512_set1_epi32(
                    black_box(0x3f00_3f00),
                ))
            };
            let mut sums = [_mm512_set1_ps(0.0); 24];
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = _mm512_dpbf16_ps(*sum, x, x);
                }
                // SAFETY: no instruction; keeps the loop.
                unsafe { asm!("/* {0} */", in(zmm_reg) sums[0]) };
            }
            black_box(sums);
        }

        #[target_feature(enable = "avx512f,avx512vnni")]
        pub fn fours_512(steps: usize) {
            let (mut sums, x) = ([_mm512_set1_epi32(0); 24], _mm512_set1_epi32(black_box(0x0101_0101)));
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = _mm512_dpbusd_epi32(*sum, x, x);
                }
                // SAFETY: no instruction; keeps the loop.
                unsafe { asm!("/* {0} */", in(zmm_reg) sums[0]) };
            }
            black_box(sums);
        }
    }
}
