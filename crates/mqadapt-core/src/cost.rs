//! What a plan saves: parameters, and bytes of K/V cache for each token.

use crate::{ModelConfig, Plan};

/// Parameters of the model under a plan (tied embeddings counted once).
#[must_use]
pub fn parameters(config: &ModelConfig, plan: &Plan) -> u64 {
    let mut planned = config.clone();
    planned.num_key_value_heads = plan.num_key_value_heads();
    planned.tensors().iter().map(|t| t.shape.iter().map(|&n| n as u64).product::<u64>()).sum()
}

/// Bytes that one token adds to the K/V cache over all layers, where a value is computed in `value_bytes` bytes.
#[must_use]
pub fn kv_bytes_per_token(config: &ModelConfig, plan: &Plan, value_bytes: usize) -> u64 {
    plan.layers().iter().map(|cache| cache.bytes_per_token(config.head_dim, value_bytes)).sum()
}
