//! Activations of a pass, in the buffers of a backend.

use crate::backend::Backend;

/// Activations of a pass; one set is reused for every layer and every pass.
pub(crate) struct Workspace<B: Backend> {
    /// The residual stream, `[rows, hidden_size]`.
    pub hidden: B::Buffer,
    /// What a norm gave, `[rows, hidden_size]`.
    pub normed: B::Buffer,
    /// `[rows, num_attention_heads * head_dim]`
    pub q: B::Buffer,
    /// `[rows, num_key_value_heads * head_dim]`
    pub k: B::Buffer,
    /// `[rows, num_key_value_heads * head_dim]`
    pub v: B::Buffer,
    /// What `o_proj` reads, `[rows, num_attention_heads * head_dim]`.
    pub attention: B::Buffer,
    /// What `down_proj` reads, `[rows, intermediate_size]`.
    pub intermediate: B::Buffer,
    /// What attention or MLP gave, where it is not added to `hidden` as it comes, `[rows, hidden_size]`.
    pub output: B::Buffer,
    /// Rows chosen for `lm_head`, `[chosen, hidden_size]`.
    pub chosen: B::Buffer,
}

impl<B: Backend> Default for Workspace<B> {
    fn default() -> Self {
        Self {
            hidden: B::Buffer::default(),
            normed: B::Buffer::default(),
            q: B::Buffer::default(),
            k: B::Buffer::default(),
            v: B::Buffer::default(),
            attention: B::Buffer::default(),
            intermediate: B::Buffer::default(),
            output: B::Buffer::default(),
            chosen: B::Buffer::default(),
        }
    }
}
