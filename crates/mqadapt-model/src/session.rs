//! A decoder and what it works with: K/V cache, rotary tables, activations. One pass at a time.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mqadapt_core::{DType, Progress};

use crate::backend::Backend;
use crate::batch::Batch;
use crate::decoder::{Decoder, Moment, Workspace};
use crate::error::{Error, Result};
use crate::rope::RopeTable;
use crate::slots::Slots;

/// Capacities are multiples of this many slots.
const SLOTS: usize = 64;

/// A decoder that can be run.
pub(crate) struct Runner<B: Backend> {
    pub decoder: Decoder<B>,
    pub kv_dtype: DType,
    /// Most rows of a pass.
    pub max_tokens_in_flight: usize,
    session: Mutex<Session<B>>,
}

/// What a pass works with. Kept between calls, so that memory is allocated for the largest only.
pub(crate) struct Session<B: Backend> {
    pub caches: Vec<B::Cache>,
    pub slots: Slots,
    capacity: usize,
    pub rope: RopeTable,
    pub batch: Batch,
    pub ws: Workspace<B>,
}

/// How far a call is, for the checks within its passes.
#[derive(Clone, Copy)]
pub(crate) struct Progressing<'a> {
    pub progress: &'a dyn Progress,
    pub phase: &'static str,
    pub done: u64,
    pub total: u64,
}

impl Progressing<'_> {
    /// Says where the call is; the place where it is interrupted.
    pub(crate) fn tell(&self) -> Result<()> {
        Ok(self.progress.advance(self.phase, self.done, self.total)?)
    }
}

impl<B: Backend> Runner<B> {
    pub(crate) fn new(decoder: Decoder<B>, kv_dtype: DType, max_tokens_in_flight: usize) -> Self {
        let session = Session {
            caches: Vec::new(),
            slots: Slots::default(),
            capacity: 0,
            rope: RopeTable::new(&decoder.config.rope),
            batch: Batch::default(),
            ws: Workspace::default(),
        };
        Self { decoder, kv_dtype, max_tokens_in_flight, session: Mutex::new(session) }
    }

    /// Another decoder, run in the same way.
    pub(crate) fn with(&self, decoder: Decoder<B>) -> Self {
        Self::new(decoder, self.kv_dtype, self.max_tokens_in_flight)
    }

    /// The session, once no other call uses it.
    pub(crate) fn session(&self) -> MutexGuard<'_, Session<B>> {
        // every call starts by resetting what it uses, so a panic in another leaves nothing wrong behind
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session with an empty cache of at least this many slots.
    pub(crate) fn session_with(&self, slots: usize) -> Result<MutexGuard<'_, Session<B>>> {
        let mut session = self.session();
        if session.capacity < slots {
            session.caches.clear(); // gone before the new ones come
            session.capacity = 0;
            let capacity = slots.checked_next_multiple_of(SLOTS).ok_or(Error::Cache { tokens: slots })?;
            let caches = self.decoder.layers.iter();
            let caches: Result<Vec<_>> = caches
                .map(|block| self.decoder.backend.cache(&block.self_attn.heads, capacity, self.kv_dtype))
                .collect();
            session.caches = caches?;
            session.capacity = capacity;
        }
        // the same slots whatever the session was used for before, so that the same call always runs the same passes
        session.slots.reset(slots);
        session.batch.clear();
        Ok(session)
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

impl<B: Backend> Session<B> {
    /// One pass of the batch through some layers, from its embeddings where `embed` says so, else from `ws.hidden`.
    pub(crate) fn pass(
        &mut self,
        decoder: &Decoder<B>,
        layers: Range<usize>,
        embed: bool,
        progressing: &Progressing<'_>,
    ) -> Result<()> {
        self.observed_pass(decoder, layers, embed, &mut |_: Moment, _: usize, _: &Workspace<B>| progressing.tell())
    }

    /// [`Self::pass`], watched.
    pub(crate) fn observed_pass(
        &mut self,
        decoder: &Decoder<B>,
        layers: Range<usize>,
        embed: bool,
        observer: &mut impl crate::decoder::Observer<B>,
    ) -> Result<()> {
        self.rope.reach(self.batch.positions_end());
        if embed {
            decoder.embed(&self.batch, &mut self.ws)?;
        }
        decoder.run(layers, &self.batch, &self.rope, &mut self.caches, &mut self.ws, observer)
    }

    /// The first half of a layer, from `ws.hidden` to `ws.attention`, watched.
    pub(crate) fn observed_attention(
        &mut self,
        decoder: &Decoder<B>,
        layer_idx: usize,
        observer: &mut impl crate::decoder::Observer<B>,
    ) -> Result<()> {
        self.rope.reach(self.batch.positions_end());
        let Some(cache) = self.caches.get_mut(layer_idx) else { return Ok(()) };
        decoder.attend(layer_idx, &self.batch, &self.rope, cache, &mut self.ws, observer)
    }
}
