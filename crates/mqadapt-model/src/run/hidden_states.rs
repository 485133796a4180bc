//! What a model shows of its inside.

/// Residual stream of some sequences at the entrance of a layer (or behind the last one, before the final norm).
#[derive(Debug, Clone, PartialEq)]
pub struct HiddenStates {
    /// Layers that have been run: 0 is the embeddings, `num_hidden_layers` all of them.
    pub layer_idx: usize,
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
    /// `[sum of lengths, hidden_size]`, one sequence after the other.
    pub values: Vec<f32>,
}

/// What one layer saw of one sequence; row-major, one row a token.
#[derive(Debug, Clone, Copy)]
pub struct LayerTrace<'a> {
    /// The layer.
    pub layer_idx: usize,
    /// Index of the sequence.
    pub sequence: usize,
    /// Residual stream entering the layer, `[tokens, hidden_size]`.
    pub hidden: &'a [f32],
    /// What the projections read: `input_layernorm` of it, `[tokens, hidden_size]`.
    pub attention_input: &'a [f32],
    /// Queries after bias and norm, before `RoPE`, `[tokens, num_attention_heads * head_dim]`.
    pub q: &'a [f32],
    /// Keys after bias and norm, before `RoPE`, `[tokens, num_key_value_heads * head_dim]`.
    pub k: &'a [f32],
    /// Values, `[tokens, num_key_value_heads * head_dim]`.
    pub v: &'a [f32],
    /// What `o_proj` reads, `[tokens, num_attention_heads * head_dim]`.
    pub attention: &'a [f32],
}
