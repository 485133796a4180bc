//! The forward pass in candle's own operations: for devices that our kernels do not know, and to be held against them.
//! On the processor weights become f32 (candle multiplies no bf16 there); on a GPU they stay as stored, and products
//! are rounded to their type.

use std::sync::Mutex;

use candle_core::{DType as CandleDType, Device, Tensor};
use candle_nn::ops::{layer_norm, rms_norm};
use candle_nn::rotary_emb::rope_thd;
use mqadapt_core::{Activation, AttentionShape, CacheStorage, DType};

use mqadapt_kernels::FloatsRef;

mod attention;

use super::{Backend, Head, HostMatrix, Linear, Norm, ScoreTarget, Scored};
use crate::error::{Error, Result};
use crate::rope::RopeTable;
use crate::run::batch::Batch;
use crate::run::divergence::divergence;

/// Rows whose logits are held at a time.
const LOGIT_ROWS: usize = 32;

/// candle's operations on one device.
pub(crate) struct Stock {
    device: Device,
    /// `0, 1, 2, ..`, f32, on the device: masks are made of it there.
    indices: Mutex<Option<Tensor>>,
    /// Rows of rotary tables that the last passes used, and where they are on the device: the layers of a pass have them in common.
    rotary: Mutex<Vec<(Vec<f32>, Tensor)>>,
}

/// Keys and values of one layer, `[num_key_value_heads, slots, head_dim]`.
pub(crate) struct StockCache {
    k: Tensor,
    v: Tensor,
}

/// Activations; `None` before the first pass.
type Buffer = Option<Tensor>;

fn held(buffer: &Buffer) -> Result<&Tensor> {
    buffer.as_ref().ok_or_else(|| candle_core::Error::Msg("a buffer was read before it was written".to_owned()).into())
}

fn candle_dtype(dtype: DType) -> CandleDType {
    match dtype {
        DType::F32 => CandleDType::F32,
        DType::F16 => CandleDType::F16,
        DType::BF16 => CandleDType::BF16,
    }
}

impl Stock {
    pub(crate) fn cpu() -> Self {
        Self::on(Device::Cpu)
    }

    fn on(device: Device) -> Self {
        Self { device, indices: Mutex::default(), rotary: Mutex::default() }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(index: usize) -> Result<Self> {
        // a stream of its own: candle's default is another one in every thread, and calls come from different ones
        let device = Device::new_cuda_with_stream(index).map_err(|source| {
            let detail = format!("no usable GPU was found ({source}); use device 'cpu'");
            Error::Device { device: format!("cuda:{index}"), detail }
        })?;
        Ok(Self::on(device))
    }

    #[cfg(not(feature = "cuda"))]
    pub(crate) fn cuda(index: usize) -> Result<Self> {
        let detail = "this build has no CUDA; install one with the feature 'cuda', or use device 'cpu'".to_owned();
        Err(Error::Device { device: format!("cuda:{index}"), detail })
    }

    fn product(x: &Tensor, linear: &Linear<Self>) -> Result<Tensor> {
        let y = Self::matmul(x, &linear.weight)?;
        Ok(match &linear.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    /// `x W^T`, f32
    fn matmul(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        Ok(x.to_dtype(weight.dtype())?.matmul(&weight.t()?)?.to_dtype(CandleDType::F32)?)
    }

    fn act(x: &Tensor, act: Activation) -> Result<Tensor> {
        Ok(match act {
            Activation::Silu => x.silu()?,
            Activation::GeluTanh => x.gelu()?,
            Activation::Gelu => x.gelu_erf()?,
        })
    }

    /// Runs over the logits of a few rows at a time: `[count, vocab_size]` from row `first` on.
    fn logit_tiles(x: &Tensor, head: &Head<Self>, mut tile: impl FnMut(usize, &Tensor) -> Result<()>) -> Result<()> {
        let rows = x.dim(0)?;
        for first in (0..rows).step_by(LOGIT_ROWS) {
            let count = LOGIT_ROWS.min(rows - first);
            let mut logits = Self::matmul(&x.narrow(0, first, count)?, &head.lm_head)?;
            if let Some(cap) = head.softcap.map(f64::from) {
                logits = ((logits / cap)?.tanh()? * cap)?;
            }
            tile(first, &logits)?;
        }
        Ok(())
    }
}

impl Backend for Stock {
    /// Their logits are stored, of all models.
    const DIVERGENCE_ROWS: usize = 8;
    type Matrix = Tensor;
    type Vector = Tensor;
    type Buffer = Buffer;
    type Cache = StockCache;

    fn matrix(&self, matrix: HostMatrix) -> Result<Tensor> {
        let shape = (matrix.out_features, matrix.in_features);
        let tensor = match matrix.values.as_ref() {
            FloatsRef::F32(values) => Tensor::from_slice(values, shape, &self.device)?,
            FloatsRef::F16(values) => Tensor::from_slice(values, shape, &self.device)?,
            FloatsRef::Bf16(values) => Tensor::from_slice(values, shape, &self.device)?,
            other => {
                return Err(candle_core::Error::Msg(format!("no tensor of {} values of this type", other.len())).into());
            }
        };
        Ok(if self.device.is_cpu() { tensor.to_dtype(CandleDType::F32)? } else { tensor })
    }

    fn matrix_bytes(&self, matrix: &Tensor) -> u64 {
        (matrix.elem_count() * matrix.dtype().size_in_bytes()) as u64
    }

    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        let len = values.len();
        Ok(Tensor::from_vec(values, len, &self.device)?)
    }

    fn enter(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            let bound = device.cuda_stream().context().bind_to_thread();
            bound.map_err(|error| candle_core::Error::Msg(format!("the GPU's context is lost ({error})")))?;
        }
        Ok(())
    }

    fn in_main_memory(&self) -> bool {
        self.device.is_cpu()
    }

    fn cache(&self, shape: &AttentionShape, storage: CacheStorage, slots: usize, dtype: DType) -> Result<StockCache> {
        if storage != CacheStorage::AsComputed {
            return Err(Error::Storage { storage: storage.name() });
        }
        let dims = (shape.num_key_value_heads, slots, shape.head_dim);
        let zeros = || Tensor::zeros(dims, candle_dtype(dtype), &self.device);
        Ok(StockCache { k: zeros()?, v: zeros()? })
    }

    fn cache_bytes(&self, cache: &StockCache) -> u64 {
        [&cache.k, &cache.v].map(|t| (t.elem_count() * t.dtype().size_in_bytes()) as u64).iter().sum()
    }

    fn upload(&self, values: &[f32], width: usize, out: &mut Buffer) -> Result<()> {
        *out = Some(Tensor::from_slice(values, (values.len() / width, width), &self.device)?);
        Ok(())
    }

    fn download(&self, buffer: &Buffer) -> Result<Vec<f32>> {
        Ok(held(buffer)?.flatten_all()?.to_vec1()?)
    }

    fn embed(&self, table: &Tensor, ids: &[u32], scale: f32, out: &mut Buffer) -> Result<()> {
        let ids = Tensor::from_slice(ids, ids.len(), &self.device)?;
        let rows = table.index_select(&ids, 0)?.to_dtype(CandleDType::F32)?;
        *out = Some((rows * f64::from(scale))?);
        Ok(())
    }

    fn norm(&self, x: &Buffer, norm: &Norm<Self>, eps: f32, out: &mut Buffer) -> Result<()> {
        let x = held(x)?.contiguous()?;
        *out = Some(match &norm.bias {
            Some(bias) => layer_norm(&x, &norm.weight, bias, eps)?,
            None => rms_norm(&x, &norm.weight, eps)?,
        });
        Ok(())
    }

    fn norm_heads(&self, x: &mut Buffer, norm: &Norm<Self>, eps: f32) -> Result<()> {
        let rows = held(x)?.dim(0)?;
        let heads = Some(held(x)?.reshape(((), norm.weight.elem_count()))?);
        self.norm(&heads, norm, eps, x)?;
        *x = Some(held(x)?.reshape((rows, ()))?);
        Ok(())
    }

    fn project(&self, x: &Buffer, layers: [&Linear<Self>; 3], outs: [&mut Buffer; 3]) -> Result<()> {
        let x = held(x)?.to_dtype(layers[0].weight.dtype())?; // once for all three
        for (linear, out) in layers.into_iter().zip(outs) {
            *out = Some(Self::product(&x, linear)?);
        }
        Ok(())
    }

    fn linear(&self, x: &Buffer, linear: &Linear<Self>, out: &mut Buffer) -> Result<()> {
        *out = Some(Self::product(held(x)?, linear)?);
        Ok(())
    }

    fn add(&self, x: &Buffer, factor: f32, out: &mut Buffer) -> Result<()> {
        *out = Some((held(out)? + (held(x)? * f64::from(factor))?)?);
        Ok(())
    }

    fn copy(&self, x: &Buffer, out: &mut Buffer) -> Result<()> {
        out.clone_from(x);
        Ok(())
    }

    fn linear_add(&self, x: &Buffer, linear: &Linear<Self>, residual: &mut Buffer) -> Result<()> {
        *residual = Some((held(residual)? + Self::product(held(x)?, linear)?)?);
        Ok(())
    }

    fn gated(
        &self,
        x: &Buffer,
        gate: &Linear<Self>,
        up: &Linear<Self>,
        act: Activation,
        out: &mut Buffer,
    ) -> Result<()> {
        let x = &held(x)?.to_dtype(gate.weight.dtype())?;
        *out = Some((Self::act(&Self::product(x, gate)?, act)? * Self::product(x, up)?)?);
        Ok(())
    }

    fn activated(&self, x: &Buffer, up: &Linear<Self>, act: Activation, out: &mut Buffer) -> Result<()> {
        *out = Some(Self::act(&Self::product(held(x)?, up)?, act)?);
        Ok(())
    }

    fn add_positions(&self, table: &Tensor, positions: &[u32], out: &mut Buffer) -> Result<()> {
        let positions = Tensor::from_slice(positions, positions.len(), &self.device)?;
        let rows = table.index_select(&positions, 0)?.to_dtype(CandleDType::F32)?;
        *out = Some((held(out)? + rows)?);
        Ok(())
    }

    fn rope(&self, x: &mut Buffer, head_dim: usize, rope: &RopeTable, batch: &Batch) -> Result<()> {
        let all = held(x)?;
        let ((rows, width), pairs) = (all.dims2()?, rope.pairs);
        let (cos, sin) = (self.rotary(&rope.cos, pairs, batch)?, self.rotary(&rope.sin, pairs, batch)?);
        let heads = all.reshape((1, rows, width / head_dim, head_dim))?;
        let turned = if 2 * pairs == head_dim {
            rope_thd(&heads.contiguous()?, &cos, &sin)?
        } else {
            let turned = rope_thd(&heads.narrow(3, 0, 2 * pairs)?.contiguous()?, &cos, &sin)?;
            Tensor::cat(&[turned, heads.narrow(3, 2 * pairs, head_dim - 2 * pairs)?], 3)?
        };
        *x = Some(turned.reshape((rows, width))?);
        Ok(())
    }

    fn store(
        &self,
        k: &Buffer,
        v: &Buffer,
        shape: &AttentionShape,
        batch: &Batch,
        cache: &mut StockCache,
    ) -> Result<()> {
        for (new, stored) in [(k, &cache.k), (v, &cache.v)] {
            let new = held(new)?.reshape(((), shape.num_key_value_heads, shape.head_dim))?;
            for segment in &batch.segments {
                let rows = new.narrow(0, segment.row, segment.rows)?.transpose(0, 1)?.to_dtype(stored.dtype())?;
                stored.slice_set(&rows.contiguous()?, 1, segment.slot)?;
            }
        }
        Ok(())
    }

    fn attend(
        &self,
        q: &Buffer,
        shape: &AttentionShape,
        batch: &Batch,
        cache: &StockCache,
        out: &mut Buffer,
    ) -> Result<()> {
        *out = Some(self.attention(held(q)?, shape, batch, cache)?);
        Ok(())
    }

    fn gather(&self, x: &Buffer, _width: usize, rows: &[usize], out: &mut Buffer) -> Result<()> {
        let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let rows = Tensor::from_slice(&rows, rows.len(), &self.device)?;
        *out = Some(held(x)?.index_select(&rows, 0)?);
        Ok(())
    }

    fn logits(&self, x: &Buffer, head: &Head<Self>, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        Self::logit_tiles(held(x)?, head, |_, logits| {
            out.extend(logits.flatten_all()?.to_vec1::<f32>()?);
            Ok(())
        })
    }

    fn score(&self, x: &Buffer, head: &Head<Self>, wanted: &[ScoreTarget], out: &mut Vec<Scored>) -> Result<()> {
        out.clear();
        let mut rest = wanted;
        Self::logit_tiles(held(x)?, head, |first, logits| {
            let (count, vocab_size) = logits.dims2()?;
            let here = rest.partition_point(|w| w.row < first + count);
            let (mine, others) = rest.split_at(here);
            rest = others;
            if mine.is_empty() {
                return Ok(());
            }
            let most = logits.max_keepdim(1)?;
            let sums = logits.broadcast_sub(&most)?.exp()?.sum(1)?.to_vec1::<f32>()?;
            let most = most.flatten_all()?.to_vec1::<f32>()?;
            let greedy = logits.argmax(1)?.to_vec1::<u32>()?;
            let at: Vec<u32> = mine.iter().map(|w| ((w.row - first) * vocab_size) as u32 + w.token).collect();
            let at = Tensor::from_slice(&at, at.len(), &self.device)?;
            let values = logits.flatten_all()?.index_select(&at, 0)?.to_vec1::<f32>()?;
            for (want, value) in mine.iter().zip(values) {
                let row = want.row - first;
                let logprob = f64::from(value) - f64::from(most[row]) - f64::from(sums[row]).ln();
                out.push(Scored { logprob, is_greedy: greedy[row] == want.token });
            }
            Ok(())
        })
    }

    fn divergences(&self, x: &Buffer, head: &Head<Self>, rows: usize, out: &mut Vec<f64>) -> Result<()> {
        let (mut logits, vocab_size) = (Vec::new(), head.lm_head.dim(0)?);
        self.logits(x, head, &mut logits)?;
        let (reference, others) = logits.split_at(rows * vocab_size);
        out.clear();
        for q in others.chunks_exact(rows * vocab_size) {
            let pairs = reference.chunks_exact(vocab_size).zip(q.chunks_exact(vocab_size));
            out.extend(pairs.map(|(p, q)| divergence(p, q)));
        }
        Ok(())
    }

    fn argmax(&self, x: &Buffer, head: &Head<Self>, out: &mut Vec<u32>) -> Result<()> {
        out.clear();
        Self::logit_tiles(held(x)?, head, |_, logits| {
            out.extend(logits.argmax(1)?.to_vec1::<u32>()?);
            Ok(())
        })
    }
}
