//! What can be wrong with a configuration or a plan.

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// What is wrong with a `config.json` or a plan. Every message says where, what was expected and what was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not JSON (or YAML), or not an object.
    #[error("{what} cannot be read: {detail}")]
    Syntax {
        /// Which document: `config.json` or `plan`.
        what: &'static str,
        /// What the parser found.
        detail: String,
    },
    /// No family of this name is known.
    #[error(
        "model_type '{found}' is unknown; the nearest is '{nearest}'; supported are {supported}; --family NAME (in Python \
         register_family) reads it as one"
    )]
    UnknownModelType {
        /// The `model_type` of the file.
        found: String,
        /// The name in [`crate::FAMILIES`] that is most like it.
        nearest: &'static str,
        /// The names in [`crate::FAMILIES`].
        supported: String,
    },
    /// There is no family of this name to insist on.
    #[error("family '{found}' does not exist; there are {supported}")]
    UnknownFamily {
        /// What was asked for.
        found: String,
        /// The names in [`crate::FAMILIES`].
        supported: String,
    },
    /// A person insists on a family for a `model_type` that has one.
    #[error(
        "model_type '{model_type}' is known, so it is not read as '{family}'; leave --family out (in Python register_family)"
    )]
    KnownModelType {
        /// The `model_type` of the file.
        model_type: String,
        /// What was asked for.
        family: &'static str,
    },
    /// A field of `config.json` is missing, has the wrong type or a value that cannot be.
    #[error("config.json: '{field}' {detail}")]
    Config {
        /// The field's name.
        field: String,
        /// What was expected and what was found.
        detail: String,
    },
    /// The plan's text does not follow the grammar.
    #[error("plan '{text}': {detail}")]
    PlanSyntax {
        /// The text as given.
        text: String,
        /// What was expected and what was found.
        detail: String,
    },
    /// The plan has another number of layers than the model.
    #[error(
        "the plan has {found} entries, but the model has {expected} layers (num_hidden_layers); give one entry per layer"
    )]
    PlanLength {
        /// Layers of the model.
        expected: usize,
        /// Entries of the plan.
        found: usize,
    },
    /// The plan names a layer that the model does not have.
    #[error("the plan names layer {layer}, but the model has layers 0 to {last}")]
    PlanLayer {
        /// The layer named.
        layer: usize,
        /// The model's last layer.
        last: usize,
    },
    /// A layer's cache is to be stored in two ways.
    #[error(
        "the plan stores the K/V cache of layer {layer} as {plan}, but kv asks for {kv}; leave one of them out, or make them equal"
    )]
    PlanStorage {
        /// The layer.
        layer: usize,
        /// The storage of the plan.
        plan: &'static str,
        /// The storage for all layers.
        kv: &'static str,
    },
    /// A layer cannot have this many K/V heads.
    #[error("layer {layer} cannot have {found} K/V heads: it has {source_heads}, so {legal} are possible")]
    PlanHeads {
        /// The layer.
        layer: usize,
        /// The count asked for.
        found: usize,
        /// `num_key_value_heads` of that layer in the source.
        source_heads: usize,
        /// The legal counts, in words.
        legal: String,
    },
}
