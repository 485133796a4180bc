//! One attention layer as plain numbers. Data in: the projections of a
//! checkpoint and the layer's geometry. Data out: checked views of them, head
//! by head, in f64 with the bias as a last column.

use faer::{Mat, MatRef};
use half::{bf16, f16};
use mqadapt_core::family::Module;
use mqadapt_core::{AttentionShape, DType};

use crate::Error;

/// The projections of one attention layer, f32, row-major as in the checkpoint.
///
/// `o_proj`'s own bias is not here: no merge changes it.
#[derive(Clone, Debug, Default, PartialEq)]
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
    /// The weight of a norm over the keys of all heads together (OLMo 2), `[num_key_value_heads * head_dim]`, or none
    pub k_norm: Option<Vec<f32>>,
}

/// Checks the fields of a shape against each other.
pub(crate) fn validate(shape: &AttentionShape) -> Result<(), Error> {
    shape.validate().map_err(Error::Geometry)
}

/// Checks a target head count.
pub(crate) fn check_target(shape: &AttentionShape, target: usize) -> Result<(), Error> {
    validate(shape)?;
    let legal = shape.legal_num_key_value_heads();
    if legal.contains(&target) {
        return Ok(());
    }
    Err(Error::Target { target, source_heads: shape.num_key_value_heads, legal })
}

impl LayerWeights {
    /// A module's weight or bias; `None` for one that the layer does not have, and for what is not here.
    pub fn tensor_mut(&mut self, module: Module, bias: bool) -> Option<&mut Vec<f32>> {
        match (module, bias) {
            (Module::QProj, false) => Some(&mut self.q_proj),
            (Module::KProj, false) => Some(&mut self.k_proj),
            (Module::VProj, false) => Some(&mut self.v_proj),
            (Module::OProj, false) => Some(&mut self.o_proj),
            (Module::QProj, true) => self.q_proj_bias.as_mut(),
            (Module::KProj, true) => self.k_proj_bias.as_mut(),
            (Module::VProj, true) => self.v_proj_bias.as_mut(),
            (Module::KNorm, false) => self.k_norm.as_mut(),
            _ => None,
        }
    }

    /// Takes the values of a module's weight or bias; what is not here is dropped.
    pub fn insert(&mut self, module: Module, bias: bool, values: Vec<f32>) {
        match (module, bias) {
            (Module::QProj, true) => self.q_proj_bias = Some(values),
            (Module::KProj, true) => self.k_proj_bias = Some(values),
            (Module::VProj, true) => self.v_proj_bias = Some(values),
            (Module::KNorm, false) => self.k_norm = Some(values),
            _ => {
                if let Some(weight) = self.tensor_mut(module, bias) {
                    *weight = values;
                }
            }
        }
    }

    /// Checks every length against `geometry` with `num_key_value_heads` K/V heads.
    ///
    /// # Errors
    /// [`Error::Shape`] names the projection.
    pub fn validate(&self, geometry: &AttentionShape, num_key_value_heads: usize) -> Result<(), Error> {
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
        let optional = [
            ("q_proj.bias", &self.q_proj_bias, q),
            ("k_proj.bias", &self.k_proj_bias, kv),
            ("v_proj.bias", &self.v_proj_bias, kv),
            ("k_norm", &self.k_norm, kv),
        ];
        for (name, values, rows) in optional {
            if let Some(values) = values {
                check_len(name, values.len(), rows)?;
            }
        }
        Ok(())
    }

    /// Whether no value is infinite or not a number.
    pub(crate) fn is_finite(&self) -> bool {
        let optional = [&self.q_proj_bias, &self.k_proj_bias, &self.v_proj_bias, &self.k_norm].into_iter().flatten();
        let weights = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj];
        weights.into_iter().chain(optional).all(|values| values.iter().all(|v| v.is_finite()))
    }

    /// Rounds every value to what `dtype` can hold, as the layer is stored.
    pub fn round_to(&mut self, dtype: DType) {
        self.tensors().into_iter().for_each(|values| round_to(values, dtype));
    }

    /// Every tensor that there is, in the order of the fields.
    pub(crate) fn tensors(&mut self) -> Vec<&mut Vec<f32>> {
        let Self { q_proj, k_proj, v_proj, o_proj, q_proj_bias, k_proj_bias, v_proj_bias, k_norm } = self;
        let mut out = vec![q_proj, k_proj, v_proj, o_proj];
        out.extend([q_proj_bias, k_proj_bias, v_proj_bias, k_norm].into_iter().flatten());
        out
    }

    /// Query heads `order[i]` become head `i`: `q_proj` rows, its bias and
    /// `o_proj` columns; K/V heads `kv_order[i]` become K/V head `i`.
    #[must_use]
    pub fn permute(&self, geometry: &AttentionShape, order: &[usize], kv_order: &[usize]) -> Self {
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
            k_norm: bias(&self.k_norm, kv_order),
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
