//! What a plan saves: parameters, and bytes of K/V cache for each token.

use crate::{KvChoice, ModelConfig, Plan};

/// Parameters of the model under a plan (tied embeddings counted once).
#[must_use]
pub fn parameters(config: &ModelConfig, plan: &Plan) -> u64 {
    let mut planned = config.clone();
    planned.num_key_value_heads = plan.num_key_value_heads();
    planned.tensors().iter().map(|t| t.shape.iter().map(|&n| n as u64).product::<u64>()).sum()
}

/// Bytes that one token adds to the K/V cache, over all layers, with `value_bytes` bytes a value.
#[must_use]
pub fn kv_bytes_per_token(config: &ModelConfig, plan: &Plan, value_bytes: usize) -> u64 {
    let values = |choice: &KvChoice| match choice {
        KvChoice::Heads(heads) => 2 * heads * config.head_dim, // one key and one value
    };
    plan.layers().iter().map(|choice| (values(choice) * value_bytes) as u64).sum()
}
