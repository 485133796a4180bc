//! GGUF tensor names to Hugging Face's, and which rows are permuted.

use mqadapt_core::family::{EMBED_TOKENS, LM_HEAD, LayerTensor, Module, NORM};

/// What a GGUF tensor is in a Hugging Face checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    EmbedTokens,
    Norm,
    LmHead,
    Layer(LayerTensor),
    /// Carries no weights: `RoPE` tables, which the configuration gives again.
    Table,
}

const MODULES: [(&str, Module); 9] = [
    ("attn_norm", Module::InputLayernorm),
    ("attn_q", Module::QProj),
    ("attn_k", Module::KProj),
    ("attn_v", Module::VProj),
    ("attn_output", Module::OProj),
    ("ffn_norm", Module::PostAttentionLayernorm),
    ("ffn_gate", Module::GateProj),
    ("ffn_up", Module::UpProj),
    ("ffn_down", Module::DownProj),
];

impl Meaning {
    /// The meaning of a name of architecture `llama`; `None` for a tensor that such a model does not have.
    pub(super) fn parse(gguf_name: &str) -> Option<Self> {
        match gguf_name {
            "token_embd.weight" => return Some(Self::EmbedTokens),
            "output_norm.weight" => return Some(Self::Norm),
            "output.weight" => return Some(Self::LmHead),
            "rope_freqs.weight" => return Some(Self::Table),
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
        let (_, module) = *MODULES.iter().find(|(name, _)| *name == module)?;
        match part {
            "weight" => Some(Self::Layer(LayerTensor::weight(layer_idx, module))),
            "bias" => Some(Self::Layer(LayerTensor::bias(layer_idx, module))),
            _ => None,
        }
    }

    /// Its name in a Hugging Face checkpoint; `None` for a table.
    pub(super) fn name(self) -> Option<String> {
        match self {
            Self::EmbedTokens => Some(EMBED_TOKENS.to_owned()),
            Self::Norm => Some(NORM.to_owned()),
            Self::LmHead => Some(LM_HEAD.to_owned()),
            Self::Layer(tensor) => Some(tensor.name()),
            Self::Table => None,
        }
    }

    /// Whether llama.cpp's converter permuted the rows (`LlamaModel.permute`), weights and biases alike.
    pub(super) fn is_permuted(self) -> bool {
        self.name().is_some_and(|name| is_permuted(&name))
    }
}

/// Whether a GGUF file holds the rows of this Hugging Face tensor in another order.
pub(super) fn is_permuted(name: &str) -> bool {
    LayerTensor::parse(name).is_some_and(|tensor| matches!(tensor.module, Module::QProj | Module::KProj))
}

/// The name in a GGUF file of a Hugging Face tensor; for messages about tensors that are missing.
pub(super) fn gguf_name(name: &str) -> String {
    match name {
        EMBED_TOKENS => "token_embd.weight".to_owned(),
        NORM => "output_norm.weight".to_owned(),
        LM_HEAD => "output.weight".to_owned(),
        _ => {
            let module = |tensor: &LayerTensor| MODULES.iter().find(|(_, module)| *module == tensor.module);
            let Some((tensor, (module, _))) = LayerTensor::parse(name).and_then(|t| Some((t, module(&t)?))) else {
                return name.to_owned();
            };
            format!("blk.{}.{module}.{}", tensor.layer_idx, if tensor.bias { "bias" } else { "weight" })
        }
    }
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
    use super::*;

    #[test]
    fn names_map_both_ways() {
        for (module_name, _) in MODULES {
            for part in ["weight", "bias"] {
                let name = format!("blk.12.{module_name}.{part}");
                let hugging_face = Meaning::parse(&name).unwrap().name().unwrap();
                assert_eq!(gguf_name(&hugging_face), name);
            }
        }
        for name in ["token_embd.weight", "output_norm.weight", "output.weight"] {
            assert_eq!(gguf_name(&Meaning::parse(name).unwrap().name().unwrap()), name);
        }
        assert_eq!(
            Meaning::parse("blk.0.attn_q.weight").unwrap().name().unwrap(),
            "model.layers.0.self_attn.q_proj.weight"
        );
    }

    #[test]
    fn names_of_other_models_have_no_meaning() {
        for name in
            ["blk.0.ffn_gate_inp.weight", "blk.01.attn_q.weight", "blk.0.attn_q_norm.weight", "blk.0.attn_q", "x"]
        {
            assert_eq!(Meaning::parse(name), None, "{name}");
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
