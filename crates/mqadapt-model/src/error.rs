//! What can go wrong while a model is loaded or run.

use std::path::PathBuf;

use mqadapt_core::Interrupted;

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. Every message says where, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint cannot be read, or lacks a tensor.
    #[error(transparent)]
    Checkpoint(#[from] mqadapt_checkpoint::Error),
    /// The configuration or the plan is not legal.
    #[error(transparent)]
    Config(#[from] mqadapt_core::Error),
    /// The checkpoint lacks a tensor that its configuration asks for.
    #[error("the checkpoint has no tensor '{tensor}'")]
    Missing {
        /// Its name.
        tensor: String,
    },
    /// A base model without an output projection.
    #[error(
        "{}: this is a base model: it has no 'lm_head.weight', and config.json does not tie one to the embeddings \
         (tie_word_embeddings), so it gives no logits; it can be inspected, converted and verified, and run only together \
         with the lm_head of the whole model",
        .path.display()
    )]
    BaseModel {
        /// The checkpoint.
        path: PathBuf,
    },
    /// No merge method of this name, or one that cannot be applied while loading.
    #[error("merge method '{found}' is not one of {known}")]
    Method {
        /// The name given.
        found: String,
        /// The names that are known.
        known: String,
    },
    /// A token id outside the vocabulary.
    #[error(
        "token id {found} is outside the vocabulary of {vocab_size} tokens (sequence {sequence}, position {position})"
    )]
    Token {
        /// The id.
        found: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
        /// Index of the sequence or request.
        sequence: usize,
        /// Index in it.
        position: usize,
    },
    /// An invalid argument.
    #[error("{name} {detail}")]
    Argument {
        /// The argument's name.
        name: &'static str,
        /// What was expected and what was found.
        detail: String,
    },
    /// The family has no forward pass here.
    #[error(
        "the family {model_type} cannot be run here: it is converted without a forward pass, by the methods mean, first and random; \
         run the result in transformers"
    )]
    NotRunnable {
        /// The family.
        model_type: &'static str,
    },
    /// A text is longer than the learned positions.
    #[error(
        "a text of {found} tokens is too long: beyond {limit} tokens this model has no positions, since they are learned; use a \
         shorter text"
    )]
    Context {
        /// The number of positions.
        limit: usize,
        /// Tokens of the text.
        found: usize,
    },
    /// A calibration text is longer than the context for which the rotary embedding has one set of frequencies.
    #[error(
        "a calibration text of {found} tokens is too long: beyond the original context of {limit} tokens the rotary embedding \
         (rope_type 'dynamic' or 'longrope') takes other frequencies than those that layers are merged for; calibrate with \
         sequences of at most {limit} tokens"
    )]
    CalibrationContext {
        /// The original context.
        limit: usize,
        /// Tokens of the text.
        found: usize,
    },
    /// Not enough main memory for the weights.
    #[error("out of memory while allocating weights: tensor '{tensor}' has {values} values")]
    Weights {
        /// The tensor.
        tensor: String,
        /// Its number of values.
        values: usize,
    },
    /// Not enough memory for a K/V cache.
    #[error(
        "out of memory while allocating a K/V cache for {tokens} tokens; use fewer (max_new_tokens, a shorter context)"
    )]
    Cache {
        /// Tokens that it would hold.
        tokens: usize,
    },
    /// Not enough memory for what a call returns.
    #[error("out of memory while allocating {bytes} bytes for {what}; process fewer tokens at a time")]
    Results {
        /// What was to be returned.
        what: &'static str,
        /// Its size in bytes.
        bytes: u64,
    },
    /// The device has no K/V cache that is stored so.
    #[error(
        "a K/V cache stored as {storage} needs device 'cpu'; on other devices leave out kv='{storage}', and '@{storage}' in the plan"
    )]
    Storage {
        /// The storage asked for.
        storage: &'static str,
    },
    /// The device is not there, or this build cannot use it.
    #[error("device '{device}' is not available: {detail}")]
    Device {
        /// The device asked for.
        device: String,
        /// Why not, and what to do.
        detail: String,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// An operation of candle failed (out of memory on the device, most often).
    #[error("the device failed: {}", without_backtrace(.0))]
    Candle(#[from] candle_core::Error),
    /// The user asked to stop.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// What candle says; `RUST_BACKTRACE` has it say where in its own code, too.
fn without_backtrace(error: &candle_core::Error) -> &candle_core::Error {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => without_backtrace(inner),
        error => error,
    }
}
