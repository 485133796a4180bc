//! What a plan asks of every attention. In: text, a file or counts, and the model's configuration; out: one legal
//! [`LayerCache`] for each layer, and what that makes of every tensor.

mod change;
mod document;
mod grammar;
mod merge_settings;

use crate::cache::divisors;
use crate::{CacheStorage, Error, LayerCache, ModelConfig, Result};
pub use change::TensorChange;
pub use document::PlanDocument;
pub use merge_settings::{MergeSettings, MergeSettingsOptions};

/// One [`LayerCache`] per layer, legal for the model that the plan was built for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Plan {
    layers: Vec<LayerCache>,
    source: Vec<usize>,
}

impl Plan {
    /// The plan that changes nothing.
    #[must_use]
    pub fn keep(config: &ModelConfig) -> Self {
        let source = config.num_key_value_heads.clone();
        Self { layers: source.iter().map(|&heads| LayerCache::heads(heads)).collect(), source }
    }

    /// A plan from one K/V-head count per layer.
    ///
    /// # Errors
    /// [`Error::PlanLength`], or [`Error::PlanHeads`] for a count that does not divide the layer's.
    pub fn from_heads(heads: &[usize], config: &ModelConfig) -> Result<Self> {
        let layers: Vec<_> = heads.iter().map(|&own| LayerCache::heads(own)).collect();
        Self::from_layers(&layers, Self::keep(config).layers())
    }

    /// A plan from what each layer caches, for a model whose layers cache `source`.
    ///
    /// # Errors
    /// [`Error::PlanLength`], or [`Error::PlanHeads`] for a layer that cannot be reduced to that.
    pub fn from_layers(layers: &[LayerCache], source: &[LayerCache]) -> Result<Self> {
        if layers.len() != source.len() {
            return Err(Error::PlanLength { expected: source.len(), found: layers.len() });
        }
        for (layer, (own, full)) in layers.iter().zip(source).enumerate() {
            let (found, source_heads) = (own.num_key_value_heads(), full.num_key_value_heads());
            if found == 0 || !source_heads.is_multiple_of(found) {
                return Err(Error::PlanHeads { layer, found, source_heads, legal: in_words(&divisors(source_heads)) });
            }
        }
        let source = source.iter().map(|cache| cache.num_key_value_heads()).collect();
        Ok(Self { layers: layers.to_vec(), source })
    }

    /// What each layer caches.
    #[must_use]
    pub fn layers(&self) -> &[LayerCache] {
        &self.layers
    }

    /// K/V heads of each layer.
    #[must_use]
    pub fn num_key_value_heads(&self) -> Vec<usize> {
        self.layers.iter().map(|cache| cache.num_key_value_heads()).collect()
    }

    /// K/V heads of each layer of the model that the plan was built for.
    #[must_use]
    pub fn source_num_key_value_heads(&self) -> &[usize] {
        &self.source
    }

    /// Whether the plan changes the weights of this layer.
    #[must_use]
    pub fn changes(&self, layer_idx: usize) -> bool {
        let own = self.layers.get(layer_idx).map(|cache| cache.form);
        own != self.source.get(layer_idx).map(|&heads| LayerCache::heads(heads).form)
    }

    /// The layers whose weights the plan changes, ascending.
    #[must_use]
    pub fn changed_layers(&self) -> Vec<usize> {
        (0..self.layers.len()).filter(|&idx| self.changes(idx)).collect()
    }

    /// Whether it leaves all weights as they are.
    #[must_use]
    pub fn is_keep(&self) -> bool {
        self.changed_layers().is_empty()
    }

    /// How the cache of each layer is stored.
    #[must_use]
    pub fn storage(&self) -> Vec<CacheStorage> {
        self.layers.iter().map(|cache| cache.storage).collect()
    }

    /// The first layer whose cache is not stored as computed.
    #[must_use]
    pub fn stored_layer(&self) -> Option<(usize, CacheStorage)> {
        let mut layers = self.layers.iter().map(|cache| cache.storage).enumerate();
        layers.find(|(_, storage)| *storage != CacheStorage::AsComputed)
    }

    /// The plan that changes no weights and stores every layer's cache as this one does.
    #[must_use]
    pub fn unmerged(&self) -> Self {
        let own = self.source.iter().zip(&self.layers);
        let layers = own.map(|(&heads, cache)| LayerCache::heads(heads).stored(cache.storage)).collect();
        Self { layers, source: self.source.clone() }
    }

    /// The plan with every layer's cache stored so.
    ///
    /// # Errors
    /// [`Error::PlanStorage`] for a layer that the plan stores otherwise.
    pub fn stored(&self, storage: CacheStorage) -> Result<Self> {
        let other = |cache: &LayerCache| !matches!(cache.storage, CacheStorage::AsComputed) && cache.storage != storage;
        if let Some(layer) = self.layers.iter().position(other) {
            let (plan, kv) = (self.layers[layer].storage.name(), storage.name());
            return Err(Error::PlanStorage { layer, plan, kv });
        }
        let layers = self.layers.iter().map(|cache| cache.stored(storage)).collect();
        Ok(Self { layers, source: self.source.clone() })
    }
}

fn in_words(counts: &[usize]) -> String {
    let words: Vec<_> = counts.iter().map(ToString::to_string).collect();
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => words.concat(),
    }
}

#[cfg(test)]
mod tests;
