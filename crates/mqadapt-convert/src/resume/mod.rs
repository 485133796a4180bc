//! What an earlier run has left. In: a working folder; out: what of it can be believed.

pub(crate) mod journal;
pub(crate) mod state;
pub(crate) mod unfinished;
