//! What a layer caches. In: a form and how its values are stored; out: its bytes. Nothing else counts the bytes of a cache.

use std::fmt;

/// What a layer caches of every token: what a plan asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerCache {
    /// What is cached.
    pub form: CacheForm,
    /// How its values are stored.
    pub storage: CacheStorage,
}

/// The form of what is cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CacheForm {
    /// A key and a value of this many K/V heads, each of the attention's `head_dim`.
    Heads(usize),
}

/// How the values of a cache are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CacheStorage {
    /// In the dtype that the model computes its cache in.
    AsComputed,
    /// 8-bit integers, with a scale of 16 bits for each head's key and each head's value.
    Int8,
    /// 4-bit integers, with a scale of 16 bits for each head's key and each head's value.
    Int4,
}

impl CacheStorage {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::AsComputed, Self::Int8, Self::Int4];

    /// Its name: `computed`, `int8`, `int4`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AsComputed => "computed",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// The storage of this name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|storage| storage.name() == name)
    }

    /// Bytes of a row of this many values, where a value is computed in `value_bytes` bytes.
    fn row_bytes(self, values: usize, value_bytes: usize) -> u64 {
        const SCALE: usize = 2;
        let bytes = match self {
            Self::AsComputed => values * value_bytes,
            Self::Int8 => values + SCALE,
            Self::Int4 => values.div_ceil(2) + SCALE,
        };
        bytes as u64
    }
}

/// The attention cache of a layer as a method made it: its answer to a [`LayerCache`]. Configuration, manifest and forward pass
/// read it; caches of two layers of equal shape are interchangeable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LayerShape {
    /// K/V heads.
    Heads {
        /// Their number.
        num_key_value_heads: usize,
        /// Values per head.
        head_dim: usize,
    },
}

impl LayerCache {
    /// K/V heads, stored as computed.
    #[must_use]
    pub fn heads(num_key_value_heads: usize) -> Self {
        Self { form: CacheForm::Heads(num_key_value_heads), storage: CacheStorage::AsComputed }
    }

    /// K/V heads of the layer.
    #[must_use]
    pub fn num_key_value_heads(self) -> usize {
        match self.form {
            CacheForm::Heads(heads) => heads,
        }
    }

    /// What a layer that caches this can be reduced to, ascending by bytes; the last is this.
    #[must_use]
    pub fn reductions(self) -> Vec<Self> {
        match self.form {
            CacheForm::Heads(heads) => {
                divisors(heads).into_iter().map(|heads| Self { form: CacheForm::Heads(heads), ..self }).collect()
            }
        }
    }

    /// The shape of the cache in an attention with heads of `head_dim` values.
    #[must_use]
    pub fn shape(self, head_dim: usize) -> LayerShape {
        match self.form {
            CacheForm::Heads(num_key_value_heads) => LayerShape::Heads { num_key_value_heads, head_dim },
        }
    }

    /// Bytes that one token adds to the cache in an attention with heads of `head_dim` values, where a value is computed in
    /// `value_bytes` bytes.
    #[must_use]
    pub fn bytes_per_token(self, head_dim: usize, value_bytes: usize) -> u64 {
        match self.shape(head_dim) {
            LayerShape::Heads { num_key_value_heads, head_dim } => {
                2 * num_key_value_heads as u64 * self.storage.row_bytes(head_dim, value_bytes) // a key, a value
            }
        }
    }

    /// The same form, stored otherwise.
    #[must_use]
    pub fn stored(self, storage: CacheStorage) -> Self {
        Self { storage, ..self }
    }
}

/// Its name in the text of a plan: `mqa`, `gqa2`, `mqa@int4`.
impl fmt::Display for LayerCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.form {
            CacheForm::Heads(1) => f.write_str("mqa"),
            CacheForm::Heads(heads) => write!(f, "gqa{heads}"),
        }?;
        match self.storage {
            CacheStorage::AsComputed => Ok(()),
            storage => write!(f, "@{}", storage.name()),
        }
    }
}

impl LayerShape {
    /// Values that one token adds to the cache.
    #[must_use]
    pub fn values_per_token(self) -> u64 {
        match self {
            Self::Heads { num_key_value_heads, head_dim } => 2 * (num_key_value_heads * head_dim) as u64, // a key, a value
        }
    }
}

/// The divisors of a head count, ascending.
pub(crate) fn divisors(heads: usize) -> Vec<usize> {
    (1..=heads).filter(|n| heads.is_multiple_of(*n)).collect()
}
