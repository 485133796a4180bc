//! A decoder and what it works with: K/V cache, rotary tables, activations. One pass at a time.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mqadapt_core::{AttentionShape, CacheStorage, DType, LayerCache, LayerShape, Progressing, Rope, RopeRegime};

use crate::allocator;
use crate::backend::Backend;
use crate::cache::slots::Slots;
use crate::decoder::{Decoder, Stage};
use crate::error::{Error, Result};
use crate::rope::RopeTables;
use crate::run::batch::Batch;
use crate::workspace::Workspace;

/// Capacities are multiples of this many slots.
const SLOTS: usize = 64;
/// Caches of no more bytes than this are kept for the next runner.
const SPARE_BYTES: u64 = 256 << 20;

/// A decoder that can be run.
pub(crate) struct Runner<B: Backend> {
    pub decoder: Decoder<B>,
    pub kv_dtype: DType,
    /// How each layer's cache is stored.
    pub storage: Vec<CacheStorage>,
    /// Most rows of a pass.
    pub max_tokens_in_flight: usize,
    session: Mutex<Session<B>>,
    /// What a runner of the same family that is gone has left. A sweep makes a runner for every plan, and memory that is
    /// new to the process costs several times what copying it costs.
    spare: Spare<B>,
}

type Spare<B> = Arc<Mutex<Option<Session<B>>>>;

/// What a pass works with. Kept between calls, so that memory is allocated for the largest only.
pub(crate) struct Session<B: Backend> {
    pub caches: Vec<B::Cache>,
    /// The shape and storage of each cache.
    shapes: Vec<(LayerShape, CacheStorage)>,
    pub slots: Slots,
    capacity: usize,
    ropes: RopeTables,
    /// Of the texts that are read now.
    regime: RopeRegime,
    pub batch: Batch,
    pub ws: Workspace<B>,
}

impl<B: Backend> Runner<B> {
    pub(crate) fn new(
        decoder: Decoder<B>,
        storage: Vec<CacheStorage>,
        kv_dtype: DType,
        max_tokens_in_flight: usize,
    ) -> Self {
        Self::sharing(decoder, storage, kv_dtype, max_tokens_in_flight, Arc::default())
    }

    fn sharing(
        decoder: Decoder<B>,
        storage: Vec<CacheStorage>,
        kv_dtype: DType,
        max_tokens_in_flight: usize,
        spare: Spare<B>,
    ) -> Self {
        let session = Session::new(&decoder);
        Self { decoder, kv_dtype, storage, max_tokens_in_flight, session: Mutex::new(session), spare }
    }

    /// Another decoder with caches stored so, run in the same way.
    pub(crate) fn with(&self, decoder: Decoder<B>, storage: Vec<CacheStorage>) -> Self {
        Self::sharing(decoder, storage, self.kv_dtype, self.max_tokens_in_flight, Arc::clone(&self.spare))
    }

    /// The session, once no other call uses it.
    pub(crate) fn session(&self) -> MutexGuard<'_, Session<B>> {
        // every call starts by resetting what it uses, so a panic in another leaves nothing wrong behind
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session with an empty cache of at least this many slots, for texts of a regime.
    pub(crate) fn session_with(&self, slots: usize, regime: RopeRegime) -> Result<MutexGuard<'_, Session<B>>> {
        self.decoder.backend.enter()?;
        let mut session = self.session();
        if session.capacity == 0 {
            self.inherit(&mut session, slots)?;
        }
        if session.capacity < slots {
            session.caches.clear(); // gone before the new ones come
            session.capacity = 0;
            let capacity = slots.checked_next_multiple_of(SLOTS).ok_or(Error::Cache { tokens: slots })?;
            if !self.has_room(capacity) {
                return Err(Error::Cache { tokens: slots });
            }
            let caches: Result<Vec<_>> = self.attentions().map(|layer| self.cache(layer, capacity)).collect();
            session.caches = caches?;
            session.shapes = self.attentions().map(|(shape, storage)| (shape.cache(), storage)).collect();
            session.capacity = capacity;
        }
        // the same slots whatever the session was used for before, so that the same call always runs the same passes
        session.slots.reset(slots);
        session.batch.clear();
        session.turn_to(regime, &self.decoder);
        Ok(session)
    }

    /// The attention of each layer, and how its cache is stored.
    fn attentions(&self) -> impl Iterator<Item = (&AttentionShape, CacheStorage)> {
        self.decoder.layers.iter().map(|block| &block.self_attn.shape).zip(self.storage.iter().copied())
    }

    /// Bytes that a token takes in the cache of each layer.
    pub(crate) fn token_bytes(&self) -> impl Iterator<Item = u64> {
        self.attentions().map(|(shape, storage)| {
            let cache = LayerCache::heads(shape.num_key_value_heads).stored(storage);
            cache.bytes_per_token(shape.head_dim, self.kv_dtype.bytes())
        })
    }

    /// Whether positions count so far, and main memory may hold a cache of this many slots.
    fn has_room(&self, capacity: usize) -> bool {
        let bytes = self.token_bytes().sum::<u64>().saturating_mul(capacity as u64);
        u32::try_from(capacity).is_ok() && (!self.decoder.backend.in_main_memory() || allocator::may_take(bytes))
    }

    fn cache(&self, (shape, storage): (&AttentionShape, CacheStorage), capacity: usize) -> Result<B::Cache> {
        self.decoder.backend.cache(shape, storage, capacity, self.kv_dtype)
    }

    /// Takes over the spare session: its activations, and where it has as many slots its caches, new ones for layers
    /// whose cache has another shape.
    fn inherit(&self, session: &mut Session<B>, slots: usize) -> Result<()> {
        let Some(mut spare) = self.spare.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        session.ws = std::mem::take(&mut spare.ws);
        if spare.capacity < slots || spare.caches.len() != self.decoder.layers.len() {
            return Ok(());
        }
        for ((layer, cache), own) in self.attentions().zip(&mut spare.caches).zip(&mut spare.shapes) {
            let (shape, storage) = layer;
            if *own != (shape.cache(), storage) {
                *own = (shape.cache(), storage);
                *cache = self.cache(layer, spare.capacity)?;
            }
        }
        (session.caches, session.shapes, session.capacity) = (spare.caches, spare.shapes, spare.capacity);
        Ok(())
    }

    /// Bytes of the cache.
    pub(crate) fn kv_bytes(&self) -> u64 {
        self.session().caches.iter().map(|cache| self.decoder.backend.cache_bytes(cache)).sum()
    }

    /// Checks that every token is one.
    pub(crate) fn check_tokens(&self, ids: &[u32], sequence: usize) -> Result<()> {
        let vocab_size = self.decoder.config.vocab_size;
        match ids.iter().position(|&id| id as usize >= vocab_size) {
            Some(position) => Err(Error::Token { found: ids[position], vocab_size, sequence, position }),
            None => Ok(()),
        }
    }
}

impl<B: Backend> Drop for Runner<B> {
    fn drop(&mut self) {
        // of the last of its family nobody takes it, and it goes with the list
        if self.kv_bytes() > SPARE_BYTES || Arc::strong_count(&self.spare) == 1 {
            return;
        }
        let session = self.session.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if session.capacity > spare.as_ref().map_or(0, |spare| spare.capacity) {
            *spare = Some(std::mem::replace(session, Session::new(&self.decoder)));
        }
    }
}

impl<B: Backend> Session<B> {
    /// One that has allocated nothing yet.
    fn new(decoder: &Decoder<B>) -> Self {
        let regime = RopeRegime::default();
        Self {
            caches: Vec::new(),
            shapes: Vec::new(),
            slots: Slots::default(),
            capacity: 0,
            ropes: tables(decoder, regime),
            regime,
            batch: Batch::default(),
            ws: Workspace::default(),
        }
    }

    /// The regime of the texts that are read now.
    pub(crate) fn regime(&self) -> RopeRegime {
        self.regime
    }

    /// Goes on with texts of a regime. Keys that were cached in another are rotated otherwise: nothing may read them any more.
    pub(crate) fn turn_to(&mut self, regime: RopeRegime, decoder: &Decoder<B>) {
        if regime != self.regime {
            (self.ropes, self.regime) = (tables(decoder, regime), regime);
        }
    }

    /// Rotary tables for the positions of the batch.
    fn reach(&mut self, decoder: &Decoder<B>) -> Result<()> {
        let end = self.batch.positions_end();
        if let Some(limit) = decoder.config.learned_positions().filter(|limit| end > *limit) {
            return Err(Error::Context { limit, found: end });
        }
        debug_assert!(decoder.config.rope_regime(end) <= self.regime, "{end} positions are read in {:?}", self.regime);
        self.ropes.reach(end);
        Ok(())
    }

    /// One pass of the batch through some layers, from its embeddings where `embed` says so, else from `ws.hidden`.
    pub(crate) fn pass(
        &mut self,
        decoder: &Decoder<B>,
        layers: Range<usize>,
        embed: bool,
        progressing: &Progressing<'_>,
    ) -> Result<()> {
        self.observed_pass(decoder, layers, embed, &mut |_: Stage, _: usize, _: &Workspace<B>| Ok(progressing.tell()?))
    }

    /// [`Self::pass`], watched.
    pub(crate) fn observed_pass(
        &mut self,
        decoder: &Decoder<B>,
        layers: Range<usize>,
        embed: bool,
        observer: &mut impl crate::decoder::Observer<B>,
    ) -> Result<()> {
        self.reach(decoder)?;
        if embed {
            decoder.embed(&self.batch, &mut self.ws)?;
        }
        decoder.run(layers, &self.batch, &self.ropes, &mut self.caches, &mut self.ws, observer)
    }

    /// The first half of a layer, from `ws.hidden` to `ws.attention`, watched.
    pub(crate) fn observed_attention(
        &mut self,
        decoder: &Decoder<B>,
        layer_idx: usize,
        observer: &mut impl crate::decoder::Observer<B>,
    ) -> Result<()> {
        self.reach(decoder)?;
        let Some(cache) = self.caches.get_mut(layer_idx) else { return Ok(()) };
        decoder.attend(layer_idx, &self.batch, &self.ropes, cache, &mut self.ws, observer)
    }
}

/// The rotary tables of a decoder for texts of a regime, empty yet.
fn tables<B: Backend>(decoder: &Decoder<B>, regime: RopeRegime) -> RopeTables {
    let of_layer = |rope: &Rope| (rope.inv_freq_of(regime), rope.attention_factor());
    RopeTables::new(decoder.config.rope.iter().map(|rope| rope.as_ref().map_or((Vec::new(), 1.0), of_layer)))
}
