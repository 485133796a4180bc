//! The forward pass on the processor, by the kernels of `mqadapt-kernels`, on buffers that are reused.

use std::sync::{Mutex, PoisonError};

use mqadapt_core::{Activation, AttentionShape, CacheStorage, DType};
use mqadapt_kernels::{
    AttentionParams, Cpu, DivergenceHead, Linear as LinearRef, MatmulOut, Precision, RopeTables, RowScore, ScoreHead,
    Segment, Store, WeightsRef,
};

use super::{Backend, Head, HostMatrix, Linear, Norm, ScoreTarget, Scored};
use crate::cache::KernelCache;
use crate::error::{Error, Result};
use crate::load::int8::Int8;
use crate::load::storage::Floats;
use crate::options::WeightFormat;
use crate::rope::RopeTable;
use crate::run::batch::Batch;

/// The kernels, how precisely they multiply, and lists that are refilled on every call.
pub(crate) struct Kernels {
    cpu: &'static Cpu,
    precision: Precision,
    format: WeightFormat,
    lists: Mutex<Lists>,
}

/// A weight matrix, `[out_features, in_features]`.
pub(crate) struct KernelMatrix {
    values: Values,
    out_features: usize,
    in_features: usize,
}

enum Values {
    Floats(Floats),
    Int8(Int8),
}

impl KernelMatrix {
    fn weights(&self) -> WeightsRef<'_> {
        match &self.values {
            Values::Floats(floats) => floats.weights(),
            Values::Int8(int8) => int8.weights(),
        }
    }
}

#[derive(Default)]
struct Lists {
    segments: Vec<Segment<'static>>,
    scores: Vec<RowScore>,
    targets: Vec<u32>,
    target_starts: Vec<usize>,
    target_logits: Vec<f32>,
    /// Of a table of positions.
    row: Vec<f32>,
}

fn matrix(linear: &Linear<Kernels>) -> LinearRef<'_> {
    LinearRef { weight: linear.weight.weights(), bias: linear.bias.as_deref().map(Vec::as_slice) }
}

/// An activation as the kernels call it.
fn activation(act: Activation) -> mqadapt_kernels::Activation {
    match act {
        Activation::Silu => mqadapt_kernels::Activation::Silu,
        Activation::GeluTanh => mqadapt_kernels::Activation::GeluTanh,
        Activation::Gelu => mqadapt_kernels::Activation::Gelu,
    }
}

/// Rows of `x`, `width` values each.
fn rows(x: &[f32], width: usize) -> usize {
    x.len() / width
}

impl Kernels {
    /// The kernels as the environment asks for them.
    pub(crate) fn new(precision: Precision, format: WeightFormat) -> Result<Self> {
        let cpu = Cpu::try_global().map_err(|detail| Error::Device { device: "cpu".to_owned(), detail })?;
        Ok(Self { cpu, precision, format, lists: Mutex::default() })
    }

    fn score_rows(&self, x: &[f32], head: &Head<Self>, lists: &mut Lists) {
        let width = head.lm_head.in_features;
        let head = ScoreHead {
            lm_head: head.lm_head.weights(),
            hidden_size: width,
            softcap: head.softcap,
            precision: self.precision,
            targets: &lists.targets,
            target_starts: &lists.target_starts,
        };
        lists.scores.resize(rows(x, width), RowScore::default());
        lists.target_logits.resize(lists.targets.len(), 0.0);
        self.cpu.score_head(&head, x, &mut lists.scores, &mut lists.target_logits);
    }

    fn lists(&self) -> std::sync::MutexGuard<'_, Lists> {
        // the lists hold nothing between calls, so a panic in one leaves nothing wrong behind
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Kernels {
    /// As many as a tile of the output head has.
    const DIVERGENCE_ROWS: usize = 96;
    type Matrix = KernelMatrix;
    type Vector = Vec<f32>;
    type Buffer = Vec<f32>;
    type Cache = KernelCache;

    fn matrix(&self, matrix: HostMatrix) -> Result<KernelMatrix> {
        let HostMatrix { values, out_features, in_features } = matrix;
        let values = match self.format {
            WeightFormat::Stored => Values::Floats(values),
            WeightFormat::Int8 => Values::Int8(Int8::new(&values, in_features, self.cpu.threads())),
        };
        Ok(KernelMatrix { values, out_features, in_features })
    }

    fn matrix_bytes(&self, matrix: &KernelMatrix) -> u64 {
        matrix.weights().bytes() as u64
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn in_main_memory(&self) -> bool {
        true
    }

    fn cache(&self, shape: &AttentionShape, storage: CacheStorage, slots: usize, dtype: DType) -> Result<KernelCache> {
        KernelCache::new(shape, storage, slots, dtype)
    }

    fn cache_bytes(&self, cache: &KernelCache) -> u64 {
        cache.bytes()
    }

    fn upload(&self, values: &[f32], _width: usize, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(values);
        Ok(())
    }

    fn download(&self, buffer: &Vec<f32>) -> Result<Vec<f32>> {
        Ok(buffer.clone())
    }

    fn embed(&self, table: &KernelMatrix, ids: &[u32], scale: f32, out: &mut Vec<f32>) -> Result<()> {
        out.resize(ids.len() * table.in_features, 0.0);
        self.cpu.gather_rows(table.weights(), table.in_features, ids, scale, out);
        Ok(())
    }

    fn norm(&self, x: &Vec<f32>, norm: &Norm<Self>, eps: f32, out: &mut Vec<f32>) -> Result<()> {
        out.resize(x.len(), 0.0);
        match &norm.bias {
            Some(bias) => self.cpu.layer_norm(x, &norm.weight, bias, eps, out),
            None => self.cpu.rms_norm(x, &norm.weight, 0.0, eps, out),
        }
        Ok(())
    }

    fn norm_heads(&self, x: &mut Vec<f32>, norm: &Norm<Self>, eps: f32) -> Result<()> {
        self.cpu.rms_norm_inplace(x, &norm.weight, 0.0, eps);
        Ok(())
    }

    fn project(&self, x: &Vec<f32>, layers: [&Linear<Self>; 3], outs: [&mut Vec<f32>; 3]) -> Result<()> {
        let k = layers[0].weight.in_features;
        let m = rows(x, k);
        let [a, b, c] = outs;
        let product = |linear: &'_ Linear<Self>, out: &mut Vec<f32>| out.resize(m * linear.weight.out_features, 0.0);
        product(layers[0], a);
        product(layers[1], b);
        product(layers[2], c);
        let products = &mut [
            MatmulOut::new(matrix(layers[0]), a),
            MatmulOut::new(matrix(layers[1]), b),
            MatmulOut::new(matrix(layers[2]), c),
        ];
        self.cpu.matmul_nt(x, m, k, products, self.precision, Store::Overwrite);
        Ok(())
    }

    fn linear(&self, x: &Vec<f32>, linear: &Linear<Self>, out: &mut Vec<f32>) -> Result<()> {
        let k = linear.weight.in_features;
        out.resize(rows(x, k) * linear.weight.out_features, 0.0);
        self.cpu.matmul_nt(
            x,
            rows(x, k),
            k,
            &mut [MatmulOut::new(matrix(linear), out)],
            self.precision,
            Store::Overwrite,
        );
        Ok(())
    }

    fn add(&self, x: &Vec<f32>, factor: f32, out: &mut Vec<f32>) -> Result<()> {
        for (out, x) in out.iter_mut().zip(x) {
            *out += factor * x;
        }
        Ok(())
    }

    fn copy(&self, x: &Vec<f32>, out: &mut Vec<f32>) -> Result<()> {
        out.clone_from(x);
        Ok(())
    }

    fn linear_add(&self, x: &Vec<f32>, linear: &Linear<Self>, residual: &mut Vec<f32>) -> Result<()> {
        let k = linear.weight.in_features;
        let product = MatmulOut::new(matrix(linear), residual);
        self.cpu.matmul_nt(x, rows(x, k), k, &mut [product], self.precision, Store::Accumulate);
        Ok(())
    }

    fn gated(
        &self,
        x: &Vec<f32>,
        gate: &Linear<Self>,
        up: &Linear<Self>,
        act: Activation,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let k = gate.weight.in_features;
        let m = rows(x, k);
        out.resize(m * gate.weight.out_features, 0.0);
        self.cpu.matmul_nt_gated(x, m, k, matrix(gate), matrix(up), activation(act), out, self.precision);
        Ok(())
    }

    fn activated(&self, x: &Vec<f32>, up: &Linear<Self>, act: Activation, out: &mut Vec<f32>) -> Result<()> {
        self.linear(x, up, out)?;
        self.cpu.activate(activation(act), out);
        Ok(())
    }

    fn add_positions(&self, table: &KernelMatrix, positions: &[u32], out: &mut Vec<f32>) -> Result<()> {
        let width = table.in_features;
        let mut lists = self.lists();
        lists.row.resize(width, 0.0);
        for (position, out) in positions.iter().zip(out.chunks_exact_mut(width)) {
            self.cpu.gather_rows(table.weights(), width, &[*position], 1.0, &mut lists.row);
            out.iter_mut().zip(&lists.row).for_each(|(out, x)| *out += x);
        }
        Ok(())
    }

    fn rope(&self, x: &mut Vec<f32>, head_dim: usize, rope: &RopeTable, batch: &Batch) -> Result<()> {
        let tables = RopeTables { cos: &rope.cos, sin: &rope.sin, rotary_dim: 2 * rope.pairs };
        let heads = x.len() / batch.rows() / head_dim;
        self.cpu.rope(x, heads, head_dim, &batch.positions, tables);
        Ok(())
    }

    fn store(
        &self,
        k: &Vec<f32>,
        v: &Vec<f32>,
        shape: &AttentionShape,
        batch: &Batch,
        cache: &mut KernelCache,
    ) -> Result<()> {
        cache.store(self.cpu, k, v, shape, batch);
        Ok(())
    }

    fn attend(
        &self,
        q: &Vec<f32>,
        shape: &AttentionShape,
        batch: &Batch,
        cache: &KernelCache,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        out.resize(q.len(), 0.0);
        let params = AttentionParams {
            num_attention_heads: shape.num_attention_heads,
            num_key_value_heads: shape.num_key_value_heads,
            scale: shape.scaling as f32,
            softcap: shape.attn_logit_softcapping.map(|cap| cap as f32),
            sliding_window: shape.sliding_window,
            precision: self.precision,
        };
        let mut lists = self.lists();
        let mut segments: Vec<Segment<'_>> = std::mem::take(&mut lists.segments);
        segments.extend(batch.segments.iter().map(|segment| Segment {
            q_start: segment.row,
            q_len: segment.rows,
            prefix: batch.prefix(segment),
            own_start: segment.slot,
        }));
        cache.attend(self.cpu, &params, q, shape.head_dim, &segments, out);
        segments.clear();
        // an empty list collected in place keeps its memory
        lists.segments = segments.into_iter().map(|segment| Segment { prefix: &[], ..segment }).collect();
        Ok(())
    }

    fn gather(&self, x: &Vec<f32>, width: usize, rows: &[usize], out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        for &row in rows {
            out.extend_from_slice(&x[row * width..(row + 1) * width]);
        }
        Ok(())
    }

    fn logits(&self, x: &Vec<f32>, head: &Head<Self>, out: &mut Vec<f32>) -> Result<()> {
        let (lm_head, k) = (&head.lm_head, head.lm_head.in_features);
        out.resize(rows(x, k) * lm_head.out_features, 0.0);
        let product = MatmulOut::new(lm_head.weights(), out);
        self.cpu.matmul_nt(x, rows(x, k), k, &mut [product], self.precision, Store::Overwrite);
        if let Some(cap) = head.softcap {
            self.cpu.softcap(out, cap);
        }
        Ok(())
    }

    fn score(&self, x: &Vec<f32>, head: &Head<Self>, wanted: &[ScoreTarget], out: &mut Vec<Scored>) -> Result<()> {
        let lists = &mut *self.lists();
        lists.targets.clear();
        lists.targets.extend(wanted.iter().map(|w| w.token));
        lists.target_starts.clear();
        lists
            .target_starts
            .extend((0..=rows(x, head.lm_head.in_features)).map(|row| wanted.partition_point(|w| w.row < row)));
        self.score_rows(x, head, lists);
        out.clear();
        out.extend(wanted.iter().zip(&lists.target_logits).map(|(wanted, logit)| {
            let row = &lists.scores[wanted.row];
            let logprob = f64::from(*logit) - f64::from(row.log_sum_exp);
            Scored { logprob, is_greedy: row.argmax == wanted.token }
        }));
        Ok(())
    }

    fn divergences(&self, x: &Vec<f32>, head: &Head<Self>, rows: usize, out: &mut Vec<f64>) -> Result<()> {
        let width = head.lm_head.in_features;
        let head = DivergenceHead {
            lm_head: head.lm_head.weights(),
            hidden_size: width,
            softcap: head.softcap,
            precision: self.precision,
        };
        out.resize(self::rows(x, width) - rows, 0.0);
        self.cpu.divergence_head(&head, x, rows, out);
        Ok(())
    }

    fn argmax(&self, x: &Vec<f32>, head: &Head<Self>, out: &mut Vec<u32>) -> Result<()> {
        let lists = &mut *self.lists();
        lists.targets.clear();
        lists.target_starts.clear();
        lists.target_starts.resize(rows(x, head.lm_head.in_features) + 1, 0);
        self.score_rows(x, head, lists);
        out.clear();
        out.extend(lists.scores.iter().map(|row| row.argmax));
        Ok(())
    }
}
