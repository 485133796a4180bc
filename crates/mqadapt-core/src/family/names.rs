//! What a family's files call its tensors. In: a name of a file, below its prefix; out: the role that all code uses, which is
//! Llama's name, and back.

use super::tensor::{EMBED_POSITIONS, EMBED_TOKENS, LM_HEAD, LayerTensor, Module, NORM, NORM_BIAS, PREFIX};
use super::{Family, Fused};

/// Names of a family's tensors.
#[derive(Debug)]
pub struct Names {
    /// What stands in front of layers, embeddings and final norm in a `...ForCausalLM`; a base model leaves it out.
    pub prefix: &'static str,
    /// The list of layers.
    pub layers: &'static str,
    /// The token embedding.
    pub embed_tokens: &'static str,
    /// The position embedding, where positions are learned.
    pub embed_positions: Option<&'static str>,
    /// The final norm.
    pub norm: &'static str,
    /// The output projection.
    pub lm_head: &'static str,
    /// Modules of a layer that have another name than Llama's.
    pub modules: &'static [(Module, &'static str)],
}

impl Names {
    /// Llama's.
    pub const LLAMA: Self = Self {
        prefix: PREFIX,
        layers: "layers",
        embed_tokens: "embed_tokens",
        embed_positions: None,
        norm: "norm",
        lm_head: "lm_head",
        modules: &[],
    };

    /// The tensors outside the layers: names below the prefix, and roles.
    fn outside(&self) -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
        let positions = self.embed_positions.map(|name| (name, "weight", EMBED_POSITIONS));
        let all =
            [(self.embed_tokens, "weight", EMBED_TOKENS), (self.norm, "weight", NORM), (self.norm, "bias", NORM_BIAS)];
        all.into_iter().chain(positions)
    }

    fn module(&self, module: Module) -> &'static str {
        self.modules.iter().find(|(own, _)| *own == module).map_or_else(|| module.name(), |(_, name)| name)
    }
}

impl Family {
    /// The role of a tensor by its name below the prefix; of one that holds several modules, [`Fused::tensor_name`].
    #[must_use]
    pub fn role(&self, below: &str) -> Option<String> {
        let names = &self.names;
        let (owner, part) = below.rsplit_once('.')?;
        if let Some((.., role)) = names.outside().find(|(name, of, _)| (*name, *of) == (owner, part)) {
            return Some(role.to_owned());
        }
        let bias = match part {
            "weight" => false,
            "bias" => true,
            _ => return None,
        };
        let (layer, name) = owner.strip_prefix(names.layers)?.strip_prefix('.')?.split_once('.')?;
        let layer_idx: usize = layer.parse().ok()?;
        if layer_idx.to_string() != layer {
            return None; // "+1" and "01" parse as numbers but are not names that a checkpoint uses
        }
        if let Some(fused) = self.fused.iter().find(|fused| fused.name == name) {
            return Some(fused.tensor_name(layer_idx, bias));
        }
        let module = Module::ALL.into_iter().find(|module| names.module(*module) == name)?;
        Some(LayerTensor { layer_idx, module, bias }.name())
    }

    /// The name below the prefix of the tensor that holds a role; `None` for one that has no prefix.
    #[must_use]
    pub fn name_below_prefix(&self, role: &str) -> Option<String> {
        let names = &self.names;
        if let Some((name, part, _)) = names.outside().find(|(.., known)| *known == role) {
            return Some(format!("{name}.{part}"));
        }
        let LayerTensor { layer_idx, module, bias } = LayerTensor::parse(role)?;
        let name = self.fused_with(module).map_or_else(|| names.module(module), |Fused { name, .. }| name);
        Some(format!("{}.{layer_idx}.{name}.{}", names.layers, if bias { "bias" } else { "weight" }))
    }

    /// The name of the output projection in its files.
    #[must_use]
    pub fn lm_head_name(&self) -> String {
        LM_HEAD.replace("lm_head", self.names.lm_head)
    }
}

#[cfg(test)]
mod tests {
    use crate::FAMILIES;
    use crate::family::{LayerTensor, Module};

    #[test]
    fn roles_and_names_of_every_family() {
        for family in FAMILIES {
            for module in Module::ALL {
                for bias in [false, true] {
                    let role = LayerTensor { layer_idx: 12, module, bias }.name();
                    let name = family.name_below_prefix(&role).unwrap();
                    match family.fused_with(module) {
                        Some(fused) => assert_eq!(family.role(&name), Some(fused.tensor_name(12, bias))),
                        None => assert_eq!(family.role(&name), Some(role)),
                    }
                }
            }
        }
    }
}
