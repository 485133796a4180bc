//! One attention layer as plain numbers. Data in: the projections of a
//! checkpoint and the layer's geometry. Data out: checked views of them, head
//! by head, in f64 with the bias as a last column.

use faer::{Mat, MatRef};
use half::{bf16, f16};
use mqadapt_core::DType;

use crate::Error;

/// The projections of one attention layer, f32, row-major as in the checkpoint.
///
/// `o_proj`'s own bias is not here: no merge changes it.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerWeights {
    /// `[num_attention_heads * head_dim, hidden_size]`
    pub q_proj: Vec<f32>,
    /// `[num_key_value_heads * head_dim, hidden_size]`
    pub k_proj: Vec<f32>,
    /// `[num_key_value_heads * head_dim, hidden_size]`
    pub v_proj: Vec<f32>,
    /// `[hidden_size, num_attention_heads * head_dim]`
    pub o_proj: Vec<f32>,
    /// `[num_attention_heads * head_dim]`, or none
    pub q_proj_bias: Option<Vec<f32>>,
    /// `[num_key_value_heads * head_dim]`, or none
    pub k_proj_bias: Option<Vec<f32>>,
    /// `[num_key_value_heads * head_dim]`, or none
    pub v_proj_bias: Option<Vec<f32>>,
}

/// What the attention of one layer does with its projections.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerGeometry {
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads of the source layer; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Width of the hidden state.
    pub hidden_size: usize,
    /// Rotary frequencies in radians per token, fastest first; pair `j` is the
    /// dims `(j, j + inv_freq.len())` of a head. Dims from `2 * inv_freq.len()`
    /// on are not rotated; empty means no rotary embedding.
    pub inv_freq: Vec<f64>,
    /// Factor on the logits, a rotary attention factor included (squared).
    pub scaling: f64,
    /// Queries and keys are normalised after their projection (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// A token sees only this many positions, itself included.
    pub sliding_window: Option<usize>,
    /// Gemma 2's `attn_logit_softcapping`.
    pub attn_logit_softcapping: Option<f64>,
}

impl LayerGeometry {
    /// Query heads per key/value head of the source.
    #[must_use]
    pub fn num_key_value_groups(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Rotated pairs per head.
    #[must_use]
    pub fn rotary_pairs(&self) -> usize {
        self.inv_freq.len()
    }

    /// The counts that `num_key_value_heads` can be merged to.
    #[must_use]
    pub fn legal_targets(&self) -> Vec<usize> {
        (1..=self.num_key_value_heads).filter(|n| self.num_key_value_heads.is_multiple_of(*n)).collect()
    }

    /// Checks the counts against each other.
    ///
    /// # Errors
    /// [`Error::Geometry`] with the two numbers that disagree.
    pub fn validate(&self) -> Result<(), Error> {
        let bad = |message: String| Err(Error::Geometry(message));
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if heads == 0 || kv == 0 || self.head_dim == 0 || self.hidden_size == 0 {
            return bad("every count must be at least 1".into());
        }
        if !heads.is_multiple_of(kv) {
            return bad(format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv}"));
        }
        if 2 * self.rotary_pairs() > self.head_dim {
            return bad(format!("{} rotary pairs do not fit into head_dim {}", self.rotary_pairs(), self.head_dim));
        }
        if !(self.scaling.is_finite() && self.scaling > 0.0) {
            return bad(format!("scaling must be positive, found {}", self.scaling));
        }
        if self.sliding_window == Some(0) {
            return bad("sliding_window must be at least 1".into());
        }
        Ok(())
    }

    /// Checks a target head count.
    ///
    /// # Errors
    /// [`Error::Target`] lists the legal counts.
    pub fn check_target(&self, target: usize) -> Result<(), Error> {
        self.validate()?;
        let legal = self.legal_targets();
        if legal.contains(&target) {
            return Ok(());
        }
        Err(Error::Target { target, source_heads: self.num_key_value_heads, legal })
    }
}

impl LayerWeights {
    /// Checks every length against `geometry` with `num_key_value_heads` K/V heads.
    ///
    /// # Errors
    /// [`Error::Shape`] names the projection.
    pub fn validate(&self, geometry: &LayerGeometry, num_key_value_heads: usize) -> Result<(), Error> {
        let (d, hidden) = (geometry.head_dim, geometry.hidden_size);
        let (q, kv) = (geometry.num_attention_heads * d, num_key_value_heads * d);
        let weights = [
            ("q_proj", &self.q_proj, q),
            ("k_proj", &self.k_proj, kv),
            ("v_proj", &self.v_proj, kv),
            ("o_proj", &self.o_proj, q),
        ];
        for (name, values, rows) in weights {
            check_len(name, values.len(), rows * hidden)?;
        }
        let biases = [
            ("q_proj.bias", &self.q_proj_bias, q),
            ("k_proj.bias", &self.k_proj_bias, kv),
            ("v_proj.bias", &self.v_proj_bias, kv),
        ];
        for (name, values, rows) in biases {
            if let Some(values) = values {
                check_len(name, values.len(), rows)?;
            }
        }
        Ok(())
    }

    /// Whether no value is infinite or not a number.
    pub(crate) fn is_finite(&self) -> bool {
        let biases = [&self.q_proj_bias, &self.k_proj_bias, &self.v_proj_bias].into_iter().flatten();
        let weights = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj];
        weights.into_iter().chain(biases).all(|values| values.iter().all(|v| v.is_finite()))
    }

    /// Rounds every value to what `dtype` can hold, as the layer is stored.
    pub fn round_to(&mut self, dtype: DType) {
        let Self { q_proj, k_proj, v_proj, o_proj, q_proj_bias, k_proj_bias, v_proj_bias } = self;
        let biases = [q_proj_bias, k_proj_bias, v_proj_bias].into_iter().flatten();
        [q_proj, k_proj, v_proj, o_proj].into_iter().chain(biases).for_each(|values| round_to(values, dtype));
    }

    /// Query heads `order[i]` become head `i`: `q_proj` rows, its bias and
    /// `o_proj` columns; K/V heads `kv_order[i]` become K/V head `i`.
    #[must_use]
    pub fn permute(&self, geometry: &LayerGeometry, order: &[usize], kv_order: &[usize]) -> Self {
        let (d, hidden) = (geometry.head_dim, geometry.hidden_size);
        let rows = |from: &[f32], order: &[usize], width: usize| -> Vec<f32> {
            order.iter().flat_map(|h| from[h * d * width..(h + 1) * d * width].iter().copied()).collect()
        };
        let mut o_proj = Vec::with_capacity(self.o_proj.len());
        for row in self.o_proj.chunks_exact(order.len() * d) {
            o_proj.extend(rows(row, order, 1));
        }
        let bias = |bias: &Option<Vec<f32>>, order| bias.as_ref().map(|b| rows(b, order, 1));
        Self {
            q_proj: rows(&self.q_proj, order, hidden),
            k_proj: rows(&self.k_proj, kv_order, hidden),
            v_proj: rows(&self.v_proj, kv_order, hidden),
            o_proj,
            q_proj_bias: bias(&self.q_proj_bias, order),
            k_proj_bias: bias(&self.k_proj_bias, kv_order),
            v_proj_bias: bias(&self.v_proj_bias, kv_order),
        }
    }
}

pub(crate) fn check_len(name: &'static str, found: usize, expected: usize) -> Result<(), Error> {
    if found == expected { Ok(()) } else { Err(Error::Shape { name, expected, found }) }
}

/// Head `head` of a projection as `[head_dim, hidden_size (+ 1 with a bias)]`.
pub(crate) fn affine_head(weight: &[f32], bias: Option<&[f32]>, head: usize, d: usize, hidden: usize) -> Mat<f64> {
    let rows = &weight[head * d * hidden..(head + 1) * d * hidden];
    Mat::from_fn(d, hidden + usize::from(bias.is_some()), |i, j| {
        if j < hidden { f64::from(rows[i * hidden + j]) } else { bias.map_or(0.0, |b| f64::from(b[head * d + i])) }
    })
}

/// Writes `[head_dim, hidden_size (+ 1)]` back as head `head`.
pub(crate) fn store_affine_head(
    from: MatRef<'_, f64>,
    head: usize,
    hidden: usize,
    weight: &mut [f32],
    bias: Option<&mut Vec<f32>>,
) {
    let d = from.nrows();
    for i in 0..d {
        let row = &mut weight[(head * d + i) * hidden..(head * d + i + 1) * hidden];
        for (j, value) in row.iter_mut().enumerate() {
            *value = round(from[(i, j)]);
        }
    }
    if let Some(bias) = bias {
        for i in 0..d {
            bias[head * d + i] = round(from[(i, hidden)]);
        }
    }
}

/// Columns of head `head` of `o_proj`: `[hidden_size, head_dim]`.
pub(crate) fn output_head(o_proj: &[f32], head: usize, num_heads: usize, d: usize, hidden: usize) -> Mat<f64> {
    Mat::from_fn(hidden, d, |i, j| f64::from(o_proj[(i * num_heads + head) * d + j]))
}

/// Writes `[hidden_size, head_dim]` back as the columns of head `head`.
pub(crate) fn store_output_head(from: MatRef<'_, f64>, head: usize, num_heads: usize, o_proj: &mut [f32]) {
    let d = from.ncols();
    for i in 0..from.nrows() {
        for j in 0..d {
            o_proj[(i * num_heads + head) * d + j] = round(from[(i, j)]);
        }
    }
}

/// Rounds values in place to what `dtype` can hold.
pub(crate) fn round_to(values: &mut [f32], dtype: DType) {
    match dtype {
        DType::F32 => {}
        DType::F16 => values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
        DType::BF16 => values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
    }
}

/// The one rounding, on write.
pub(crate) fn round(value: f64) -> f32 {
    value as f32
}
