//! Other attention weights for single layers of a loaded model; everything else is shared.

use std::sync::Arc;

use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::LayerWeights;
use mqadapt_core::family::{LayerTensor, Module};
use mqadapt_core::{DType, ModelConfig, Progress};
use xxhash_rust::xxh3::Xxh3;

use crate::attention::Attention;
use crate::backend::{Backend, HostMatrix, Linear, Norm};
use crate::block::Block;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::load::storage::Floats;
use crate::load::weights::{self, Overlay, Weights};

/// A name for these values.
pub(crate) fn fingerprint(weights: &LayerWeights) -> String {
    let mut hash = Xxh3::new();
    let LayerWeights { q_proj, k_proj, v_proj, o_proj, q_proj_bias, k_proj_bias, v_proj_bias, k_norm } = weights;
    let optional = [q_proj_bias, k_proj_bias, v_proj_bias, k_norm].map(Option::as_ref);
    for values in [q_proj, k_proj, v_proj, o_proj].map(Some).into_iter().chain(optional) {
        hash.update(&values.map_or(0, Vec::len).to_le_bytes());
        values.into_iter().flatten().for_each(|value| hash.update(&value.to_le_bytes()));
    }
    format!("{:016x}", hash.digest())
}

impl<B: Backend> Linear<B> {
    fn shared(&self) -> Self {
        Self { weight: Arc::clone(&self.weight), bias: self.bias.clone() }
    }
}

/// A decoder that shares everything with another, and can have layers replaced.
fn shared<B: Backend>(decoder: &Decoder<B>, config: ModelConfig) -> Decoder<B> {
    Decoder {
        backend: Arc::clone(&decoder.backend),
        config,
        embedding_scale: decoder.embedding_scale,
        embed_tokens: Arc::clone(&decoder.embed_tokens),
        embed_positions: decoder.embed_positions.clone(),
        layers: decoder.layers.clone(),
        norm: Arc::clone(&decoder.norm),
        head: decoder.head.shared(),
    }
}

/// Puts other attention into a layer.
fn replace<B: Backend>(decoder: &mut Decoder<B>, layer_idx: usize, self_attn: Attention<B>) {
    let Some(layer) = decoder.layers.get_mut(layer_idx) else { return };
    *layer = Arc::new(Block {
        self_attn,
        norms: Arc::clone(&layer.norms),
        mlp: Arc::clone(&layer.mlp),
        eps: layer.eps,
        residual_multiplier: layer.residual_multiplier,
        parallel: layer.parallel,
    });
}

/// The decoder with the K/V weights of some layers read again under a plan. `config`: with the plan's heads.
pub(crate) fn with_plan<B: Backend>(
    decoder: &Decoder<B>,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    overlay: &Overlay<'_>,
    layers: &[usize],
    dtype: Option<DType>,
    progress: &dyn Progress,
) -> Result<Decoder<B>> {
    let mut names = Vec::new();
    for &layer_idx in layers {
        for module in Module::ALL.into_iter().filter(|module| config.has_key_value_rows(*module)) {
            names.push(LayerTensor::weight(layer_idx, module).name());
            if config.has_bias(module) {
                names.push(LayerTensor::bias(layer_idx, module).name());
            }
        }
    }
    let tensors = weights::read(checkpoint, &names, Some(overlay), dtype, progress)?;
    let mut out = shared(decoder, config.clone());
    let mut weights = Weights { backend: &*decoder.backend, config, tensors };
    for &layer_idx in layers {
        let Some(layer) = decoder.layers.get(layer_idx) else { continue };
        let old = &layer.self_attn;
        let self_attn = Attention {
            shape: weights::attention(config, layer_idx)?,
            q_proj: old.q_proj.shared(),
            k_proj: weights.linear(layer_idx, Module::KProj)?,
            v_proj: weights.linear(layer_idx, Module::VProj)?,
            o_proj: old.o_proj.shared(),
            q_norm: old.q_norm.clone(),
            k_norm: weights.changed_norm(layer_idx, Module::KNorm)?.map(Arc::new).or_else(|| old.k_norm.clone()),
        };
        replace(&mut out, layer_idx, self_attn);
    }
    Ok(out)
}

/// The decoder with some layers taken from others. `config`: with the heads of all of them.
pub(crate) fn with_layers_of<B: Backend>(
    decoder: &Decoder<B>,
    config: ModelConfig,
    layers: &[(usize, &Decoder<B>)],
) -> Result<Decoder<B>> {
    let mut out = shared(decoder, config);
    for &(layer_idx, donor) in layers {
        let (Some(layer), Some(theirs)) = (out.layers.get_mut(layer_idx), donor.layers.get(layer_idx)) else {
            let detail = format!("has no layer {layer_idx}");
            return Err(Error::Argument { name: "layers", detail });
        };
        *layer = Arc::clone(theirs);
    }
    Ok(out)
}

/// The decoder with one layer's attention replaced. `config`: with the layer's new heads; `dtype`: of the weights.
pub(crate) fn with_layer<B: Backend>(
    decoder: &Decoder<B>,
    config: &ModelConfig,
    layer_idx: usize,
    new: &LayerWeights,
    dtype: DType,
) -> Result<Decoder<B>> {
    let layers = decoder.layers.len();
    let Some(layer) = decoder.layers.get(layer_idx) else {
        let detail = format!("must be below {layers}; found {layer_idx}");
        return Err(Error::Argument { name: "layer_idx", detail });
    };
    let old = &layer.self_attn;
    let check = |tensor: LayerTensor, values: &[f32], len: usize| {
        let detail = format!("need {len} values for '{}'; found {}", tensor.name(), values.len());
        if values.len() == len { Ok(()) } else { Err(Error::Argument { name: "weights", detail }) }
    };
    let linear = |module: Module, weight: &[f32], bias: Option<&Vec<f32>>, old: &Linear<B>| -> Result<Linear<B>> {
        let shape = config.weight_shape(layer_idx, module).unwrap_or_default();
        let &[out_features, in_features] = shape.as_slice() else { return Ok(old.shared()) };
        let mut linear = old.shared();
        check(LayerTensor::weight(layer_idx, module), weight, out_features * in_features)?;
        let values = Floats::from_f32(weight, dtype);
        linear.weight = Arc::new(decoder.backend.matrix(HostMatrix { values, out_features, in_features })?);
        if let Some(bias) = bias {
            check(LayerTensor::bias(layer_idx, module), bias, out_features)?;
            linear.bias = Some(Arc::new(decoder.backend.vector(Floats::from_f32(bias, dtype).to_f32())?));
        } else if module.is_key_value() && linear.bias.is_some() {
            check(LayerTensor::bias(layer_idx, module), &[], out_features)?;
        }
        Ok(linear)
    };
    let mut k_norm = old.k_norm.clone();
    if config.has_key_value_rows(Module::KNorm) {
        let (tensor, values) =
            (LayerTensor::weight(layer_idx, Module::KNorm), new.k_norm.as_deref().unwrap_or_default());
        check(tensor, values, config.weight_shape(layer_idx, Module::KNorm).unwrap_or_default().iter().product())?;
        let weight = decoder.backend.vector(Floats::from_f32(values, dtype).to_f32())?;
        k_norm = Some(Arc::new(Norm { weight, bias: None }));
    }
    let self_attn = Attention {
        shape: weights::attention(config, layer_idx)?,
        q_proj: linear(Module::QProj, &new.q_proj, new.q_proj_bias.as_ref(), &old.q_proj)?,
        k_proj: linear(Module::KProj, &new.k_proj, new.k_proj_bias.as_ref(), &old.k_proj)?,
        v_proj: linear(Module::VProj, &new.v_proj, new.v_proj_bias.as_ref(), &old.v_proj)?,
        o_proj: linear(Module::OProj, &new.o_proj, None, &old.o_proj)?,
        q_norm: old.q_norm.clone(),
        k_norm,
    };
    let mut out = shared(decoder, config.clone());
    replace(&mut out, layer_idx, self_attn);
    Ok(out)
}
