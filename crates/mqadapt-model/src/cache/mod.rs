//! What is cached of past tokens: which slots are in use, and the kinds of cache that the kernels read.
//!
//! A kind of cache is one file, which knows its bytes, how rows are stored, and how queries attend to them.

mod float;
pub(crate) mod slots;

pub(crate) use float::FloatCache;
