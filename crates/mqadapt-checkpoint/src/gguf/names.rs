//! GGUF tensor names to Hugging Face's, and which tensors hold their values in another form.

use mqadapt_core::family::{EMBED_POSITIONS, EMBED_TOKENS, LM_HEAD, LayerTensor, Module, NORM, NORM_BIAS};

use super::architecture::{Architecture, StoredModule};

/// What a GGUF tensor is in a Hugging Face checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    EmbedTokens,
    EmbedPositions,
    Norm,
    NormBias,
    LmHead,
    /// Rows of one module, or of several one under the other.
    Layer {
        layer_idx: usize,
        modules: &'static [Module],
        bias: bool,
    },
    /// Carries no weights: `RoPE` tables, which the configuration gives again.
    Table,
}

impl Meaning {
    /// The meaning of a name; `None` for a tensor that a model of this architecture does not have.
    pub(super) fn parse(architecture: &Architecture, gguf_name: &str) -> Option<Self> {
        match gguf_name {
            "token_embd.weight" => return Some(Self::EmbedTokens),
            "position_embd.weight" => return Some(Self::EmbedPositions),
            "output_norm.weight" => return Some(Self::Norm),
            "output_norm.bias" => return Some(Self::NormBias),
            "output.weight" => return Some(Self::LmHead),
            "rope_freqs.weight" | "rope_factors_long.weight" | "rope_factors_short.weight" => return Some(Self::Table),
            _ => {}
        }
        let (layer, rest) = gguf_name.strip_prefix("blk.")?.split_once('.')?;
        let layer_idx: usize = layer.parse().ok()?;
        if layer_idx.to_string() != layer {
            return None; // "+1" and "01" parse as numbers but are not names that a file uses
        }
        let (module, part) = rest.split_once('.')?;
        if matches!(module, "attn_rot_embd" | "rope_freqs") {
            return Some(Self::Table);
        }
        let &(_, modules) = architecture.stored_modules().find(|(name, _)| *name == module)?;
        let bias = match part {
            "weight" => false,
            "bias" => true,
            _ => return None,
        };
        Some(Self::Layer { layer_idx, modules, bias })
    }

    /// The Hugging Face tensors whose rows it holds, in their order; none for a table.
    pub(super) fn names(self) -> Vec<String> {
        match self {
            Self::EmbedTokens => vec![EMBED_TOKENS.to_owned()],
            Self::EmbedPositions => vec![EMBED_POSITIONS.to_owned()],
            Self::Norm => vec![NORM.to_owned()],
            Self::NormBias => vec![NORM_BIAS.to_owned()],
            Self::LmHead => vec![LM_HEAD.to_owned()],
            Self::Layer { layer_idx, modules, bias } => {
                modules.iter().map(|&module| LayerTensor { layer_idx, module, bias }.name()).collect()
            }
            Self::Table => Vec::new(),
        }
    }
}

/// How a GGUF file stores the values of a tensor, beside their type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    /// Rows of queries and keys in another order; biases too.
    pub permuted: bool,
    /// The values are 1 larger.
    pub plus_one: bool,
}

impl Form {
    /// Of a Hugging Face tensor.
    pub(super) fn of(architecture: &Architecture, name: &str) -> Self {
        let module = LayerTensor::parse(name).map(|tensor| tensor.module);
        let permuted = matches!(module, Some(Module::QProj | Module::KProj));
        let norm = name == NORM || module.is_some_and(is_norm);
        Self { permuted: architecture.permuted && permuted, plus_one: architecture.norm_plus_one && norm }
    }

    /// Whether the stored values are those of the Hugging Face tensor, in its order.
    pub(super) fn is_plain(self) -> bool {
        !self.permuted && !self.plus_one
    }
}

fn is_norm(module: Module) -> bool {
    matches!(
        module,
        Module::InputLayernorm
            | Module::QNorm
            | Module::KNorm
            | Module::PostAttentionLayernorm
            | Module::PreFeedforwardLayernorm
            | Module::PostFeedforwardLayernorm
    )
}

/// The name in a GGUF file of a Hugging Face tensor; for messages about tensors that are missing.
pub(super) fn gguf_name(architecture: &Architecture, name: &str) -> String {
    match name {
        EMBED_TOKENS => return "token_embd.weight".to_owned(),
        EMBED_POSITIONS => return "position_embd.weight".to_owned(),
        NORM => return "output_norm.weight".to_owned(),
        NORM_BIAS => return "output_norm.bias".to_owned(),
        LM_HEAD => return "output.weight".to_owned(),
        _ => {}
    }
    let Some(LayerTensor { layer_idx, module, bias }) = LayerTensor::parse(name) else { return name.to_owned() };
    let holds = |stored: &&StoredModule| stored.1.contains(&module);
    let Some((stored, _)) = architecture.stored_modules().find(holds) else { return name.to_owned() };
    format!("blk.{layer_idx}.{stored}.{}", if bias { "bias" } else { "weight" })
}

/// The row of the file that holds row `row` of the Hugging Face tensor.
///
/// Hugging Face rotates pairs `(j, j + head_dim / 2)` of a head, GGUF pairs `(2 j, 2 j + 1)`.
pub(super) fn permuted_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + 2 * (within % half) + within / half
}

#[cfg(test)]
mod tests {
    use super::super::architecture::ARCHITECTURES;
    use super::*;

    fn llama() -> &'static Architecture {
        ARCHITECTURES[0]
    }

    #[test]
    fn names_map_both_ways() {
        for architecture in ARCHITECTURES {
            for (module_name, modules) in architecture.stored_modules() {
                for part in ["weight", "bias"] {
                    let name = format!("blk.12.{module_name}.{part}");
                    let hugging_face = Meaning::parse(architecture, &name).unwrap().names();
                    assert_eq!(hugging_face.len(), modules.len());
                    assert!(hugging_face.iter().all(|own| gguf_name(architecture, own) == name));
                }
            }
            let names = [
                "token_embd.weight",
                "position_embd.weight",
                "output_norm.weight",
                "output_norm.bias",
                "output.weight",
            ];
            for name in names {
                let hugging_face = Meaning::parse(architecture, name).unwrap().names();
                assert_eq!(gguf_name(architecture, &hugging_face[0]), name);
            }
        }
        let names = Meaning::parse(llama(), "blk.0.attn_q.weight").unwrap().names();
        assert_eq!(names, ["model.layers.0.self_attn.q_proj.weight"]);
    }

    #[test]
    fn modules_are_stored_once() {
        for architecture in ARCHITECTURES {
            let modules: Vec<Module> =
                architecture.stored_modules().flat_map(|(_, modules)| *modules).copied().collect();
            assert!(modules.iter().enumerate().all(|(i, module)| !modules[..i].contains(module)), "{architecture:?}");
        }
    }

    #[test]
    fn names_of_other_models_have_no_meaning() {
        for name in
            ["blk.0.ffn_gate_inp.weight", "blk.01.attn_q.weight", "blk.0.attn_q_norm.weight", "blk.0.attn_q", "x"]
        {
            assert_eq!(Meaning::parse(llama(), name), None, "{name}");
        }
    }

    #[test]
    fn the_permutation_is_that_of_the_converter() {
        // reshape(heads, 2, head_dim / 2).swapaxes(1, 2) of the rows 0..16, two heads
        let (heads, head_dim) = (2, 8);
        let mut file_rows = Vec::new();
        for head in 0..heads {
            for j in 0..head_dim / 2 {
                for half in 0..2 {
                    file_rows.push(head * head_dim + half * head_dim / 2 + j);
                }
            }
        }
        for row in 0..heads * head_dim {
            assert_eq!(file_rows[permuted_row(row, head_dim)], row);
        }
    }
}
