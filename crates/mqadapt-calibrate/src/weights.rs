//! A layer's attention weights, shape and norms. In: a checkpoint; out: what a merge takes.

use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::{LayerWeights, QkNorm};
use mqadapt_core::family::{LayerTensor, Module, QkNorm as QkNormKind};
use mqadapt_core::{AttentionShape, ModelConfig};

use crate::{Error, Result};

/// The attention of a layer that the model has.
pub(crate) fn attention(config: &ModelConfig, layer_idx: usize) -> Result<AttentionShape> {
    config.attention(layer_idx).ok_or_else(|| Error::Argument {
        name: "layer_idx",
        detail: format!("must be below {}; found {layer_idx}", config.num_hidden_layers),
    })
}

/// The attention weights of a layer as the checkpoint has them, widened to f32.
///
/// # Errors
/// [`Error::Model`] where one is missing, [`Error::Checkpoint`].
pub fn layer_weights(checkpoint: &Checkpoint, layer_idx: usize) -> Result<LayerWeights> {
    let config = checkpoint.config();
    let weight = |module| read(checkpoint, LayerTensor::weight(layer_idx, module));
    let bias =
        |module| config.has_bias(module).then(|| read(checkpoint, LayerTensor::bias(layer_idx, module))).transpose();
    Ok(LayerWeights {
        q_proj: weight(Module::QProj)?,
        k_proj: weight(Module::KProj)?,
        v_proj: weight(Module::VProj)?,
        o_proj: weight(Module::OProj)?,
        q_proj_bias: bias(Module::QProj)?,
        k_proj_bias: bias(Module::KProj)?,
        v_proj_bias: bias(Module::VProj)?,
        k_norm: config.has_key_value_rows(Module::KNorm).then(|| weight(Module::KNorm)).transpose()?,
    })
}

/// The norms of queries and keys of a layer, where it has them.
///
/// # Errors
/// [`Error::Model`] where one is missing, [`Error::Checkpoint`].
pub(crate) fn qk_norm(checkpoint: &Checkpoint, layer_idx: usize) -> Result<Option<QkNorm>> {
    let config = checkpoint.config();
    if config.family.forward.qk_norm == QkNormKind::None {
        return Ok(None);
    }
    let norm = |module| -> Result<Vec<f32>> {
        let mut weight = read(checkpoint, LayerTensor::weight(layer_idx, module))?;
        if config.family.forward.norm_weight_plus_one {
            for w in &mut weight {
                *w += 1.0;
            }
        }
        Ok(weight)
    };
    Ok(Some(QkNorm { q_norm: norm(Module::QNorm)?, k_norm: norm(Module::KNorm)?, eps: config.rms_norm_eps }))
}

fn read(checkpoint: &Checkpoint, tensor: LayerTensor) -> Result<Vec<f32>> {
    let name = tensor.name();
    let info = checkpoint.tensor(&name).ok_or(mqadapt_model::Error::Missing { tensor: name })?;
    let mut values = vec![0.0; info.len()];
    checkpoint.read_finite(info, 0, &mut values)?;
    Ok(values)
}
