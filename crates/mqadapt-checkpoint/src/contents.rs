//! What opening any kind of checkpoint finds.

use mqadapt_core::ModelConfig;

use crate::{Shard, TensorInfo};

/// Configuration, files and tensors of a checkpoint.
#[derive(Debug)]
pub(crate) struct Contents {
    pub config: ModelConfig,
    pub shards: Vec<Shard>,
    pub tensors: Vec<TensorInfo>,
}
