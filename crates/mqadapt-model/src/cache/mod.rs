//! What is cached of past tokens: which slots are in use, and the kinds of cache that the kernels read.
//!
//! A kind of cache is one file, which knows its bytes, how rows are stored, and how queries attend to them.

mod float;
mod kind;
mod packed;
pub(crate) mod slots;

use float::FloatCache;
pub(crate) use kind::KernelCache;
use packed::PackedCache;
