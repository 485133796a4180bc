//! Groups of modules that architectures share: names in a GGUF file (`tensor_mapping.py` of the package `gguf`).

use mqadapt_core::family::Module;

use super::StoredModule;

/// The matrices of attention and MLP, each by itself.
pub(super) const PROJECTIONS: &[StoredModule] = &[
    ("attn_q", &[Module::QProj]),
    ("attn_k", &[Module::KProj]),
    ("attn_v", &[Module::VProj]),
    ("attn_output", &[Module::OProj]),
    ("ffn_gate", &[Module::GateProj]),
    ("ffn_up", &[Module::UpProj]),
    ("ffn_down", &[Module::DownProj]),
];

/// Norms in front of attention and MLP.
pub(super) const NORMS_BEFORE: &[StoredModule] =
    &[("attn_norm", &[Module::InputLayernorm]), ("ffn_norm", &[Module::PostAttentionLayernorm])];

/// Norms on the queries and keys of a head.
pub(super) const QUERY_KEY_NORMS: &[StoredModule] =
    &[("attn_q_norm", &[Module::QNorm]), ("attn_k_norm", &[Module::KNorm])];

/// Norms in front of attention and MLP, and on what both give.
pub(super) const NORMS_AROUND: &[StoredModule] = &[
    ("attn_norm", &[Module::InputLayernorm]),
    ("post_attention_norm", &[Module::PostAttentionLayernorm]),
    ("ffn_norm", &[Module::PreFeedforwardLayernorm]),
    ("post_ffw_norm", &[Module::PostFeedforwardLayernorm]),
];

/// The matrices of attention, those with the same input in one tensor.
pub(super) const FUSED_ATTENTION: &[StoredModule] =
    &[("attn_qkv", &[Module::QProj, Module::KProj, Module::VProj]), ("attn_output", &[Module::OProj])];

/// The matrices of a gated MLP, those with the same input in one tensor.
pub(super) const FUSED_MLP: &[StoredModule] =
    &[("ffn_up", &[Module::GateProj, Module::UpProj]), ("ffn_down", &[Module::DownProj])];

/// The matrices of an MLP without gate.
pub(super) const PLAIN_MLP: &[StoredModule] = &[("ffn_up", &[Module::UpProj]), ("ffn_down", &[Module::DownProj])];
