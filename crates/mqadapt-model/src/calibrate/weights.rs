//! A layer's attention weights and geometry, as the merges and the forward pass want them.

use mqadapt_checkpoint::Checkpoint;
use mqadapt_core::ModelConfig;
use mqadapt_core::family::{LayerTensor, Module};
use mqadapt_merge::closed_form::QkNorm;
use mqadapt_merge::{LayerGeometry, LayerWeights};

use crate::overlay::AttentionWeights;
use crate::{Error, Result};

/// The geometry of a layer of a model.
#[must_use]
pub fn layer_geometry(config: &ModelConfig, layer_idx: usize) -> LayerGeometry {
    let heads = crate::load::heads(config, layer_idx);
    LayerGeometry {
        num_attention_heads: heads.num_attention_heads,
        num_key_value_heads: heads.num_key_value_heads,
        head_dim: heads.head_dim,
        hidden_size: config.hidden_size,
        inv_freq: config.rope.inv_freq(),
        scaling: f64::from(heads.scaling),
        qk_norm: config.family.forward.qk_norm,
        sliding_window: heads.sliding_window,
        attn_logit_softcapping: None,
    }
}

/// The attention weights of a layer as the checkpoint has them, widened to f32.
///
/// # Errors
/// [`Error::Missing`], [`Error::Checkpoint`].
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
    })
}

/// The norms of queries and keys of a layer, where it has them.
///
/// # Errors
/// [`Error::Missing`], [`Error::Checkpoint`].
pub(crate) fn qk_norm(checkpoint: &Checkpoint, layer_idx: usize) -> Result<Option<QkNorm>> {
    let config = checkpoint.config();
    if !config.family.forward.qk_norm {
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
    let info = checkpoint.tensor(&name).ok_or(Error::Missing { tensor: name })?;
    let mut values = vec![0.0; info.len()];
    checkpoint.read_finite(info, 0, &mut values)?;
    Ok(values)
}

/// All weights of a merged layer, for the forward pass.
#[must_use]
pub fn attention_weights(weights: &LayerWeights, num_key_value_heads: usize) -> AttentionWeights {
    AttentionWeights {
        num_key_value_heads,
        q_proj: Some(weights.q_proj.clone()),
        k_proj: weights.k_proj.clone(),
        v_proj: weights.v_proj.clone(),
        o_proj: Some(weights.o_proj.clone()),
        q_proj_bias: weights.q_proj_bias.clone(),
        k_proj_bias: weights.k_proj_bias.clone(),
        v_proj_bias: weights.v_proj_bias.clone(),
    }
}
