//! What a plan makes of a tensor: asked by the layout of a conversion, its verification, the loading of a model and the
//! merging of rows alike.

use super::Plan;
use crate::ModelConfig;
use crate::family::{LayerTensor, Module};

/// What becomes of one tensor of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorChange {
    /// It stays as it is, bit for bit.
    Keep,
    /// Its shape stays; a method that is given whole layers may change its values to compensate the change of others.
    Compensate,
    /// Its rows belong to K/V heads, whose number changes.
    Heads {
        /// K/V heads of the source.
        from: usize,
        /// K/V heads under the plan; divides `from`.
        to: usize,
    },
}

impl Plan {
    /// What the plan makes of a tensor of the model that it was built for.
    #[must_use]
    pub fn change(&self, config: &ModelConfig, tensor: LayerTensor) -> TensorChange {
        let layer_idx = tensor.layer_idx;
        // a bias that the model does not have (transformers ignores it) stays as it is
        if !self.changes(layer_idx) || (tensor.bias && !config.has_bias(tensor.module)) {
            return TensorChange::Keep;
        }
        match (tensor.module, self.source.get(layer_idx), self.layers.get(layer_idx)) {
            (module, Some(&from), Some(cache)) if config.has_key_value_rows(module) => {
                TensorChange::Heads { from, to: cache.num_key_value_heads() }
            }
            // no method changes the bias behind the attention
            (Module::OProj, ..) if tensor.bias => TensorChange::Keep,
            (Module::QProj | Module::OProj, ..) => TensorChange::Compensate,
            _ => TensorChange::Keep,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_of_a_changed_layer() {
        let config = ModelConfig::from_json(
            r#"{"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 8, "vocab_size": 9,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}"#,
        )
        .unwrap();
        let plan = Plan::parse("gqa2:1", &config).unwrap();
        for module in Module::ALL {
            let of = |tensor| plan.change(&config, tensor);
            assert_eq!(of(LayerTensor::weight(0, module)), TensorChange::Keep);
            assert_eq!(of(LayerTensor::weight(7, module)), TensorChange::Keep);
            let (weight, bias) = match module {
                Module::KProj | Module::VProj => {
                    (TensorChange::Heads { from: 4, to: 2 }, TensorChange::Heads { from: 4, to: 2 })
                }
                Module::QProj => (TensorChange::Compensate, TensorChange::Compensate),
                Module::OProj => (TensorChange::Compensate, TensorChange::Keep), // Qwen2's has no bias
                _ => (TensorChange::Keep, TensorChange::Keep),
            };
            assert_eq!(of(LayerTensor::weight(1, module)), weight, "{module:?}");
            assert_eq!(of(LayerTensor::bias(1, module)), bias, "{module:?}");
        }
    }
}
