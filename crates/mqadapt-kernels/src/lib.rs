//! CPU kernels of the forward pass, chosen for the processor at run time.
//!
//! Everything hangs off [`Cpu`]: an instruction set plus a pool of threads. Activations are `f32`,
//! row-major and contiguous; weights and K/V caches keep the dtype they are stored in and are
//! widened in registers, so nothing is packed, expanded or copied.
//!
//! ```
//! use mqadapt_kernels::{Cpu, MatmulOut, Precision, Store, WeightsRef};
//!
//! let cpu = Cpu::global();
//! let x = [1.0, 2.0, 3.0]; // [1, 3]
//! let weight = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]; // [2, 3]
//! let mut out = [0.0; 2]; // [1, 2]
//! let product = MatmulOut::new(WeightsRef::F32(&weight), &mut out);
//! cpu.matmul_nt(&x, 1, 3, &mut [product], Precision::Exact, Store::Overwrite);
//! assert_eq!(out, [1.0, 5.0]);
//! ```
//!
//! # What a result depends on
//!
//! On its own inputs, the instruction set and [`Precision`]: nothing else. Every output element has
//! one fixed order of additions, so it does not depend on the number of threads, on which
//! other rows share the batch, nor on how a prompt is cut into prefill calls, decode steps or
//! [`Segment`]s. A token decoded against a cache gets the bits that prefilling the whole prompt
//! gives, provided that both calls name the same [`Precision`]. Instruction sets differ from each other in
//! the last bits, since the number of lanes sets the order of additions.
//!
//! # Memory
//!
//! Scratch space lives in each thread and grows to its largest use, so a call whose shape was
//! seen before allocates nothing. Shape errors are programming errors and panic; each function says when.

#![allow(
    clippy::inline_always,
    reason = "a kernel's body inherits the instruction set of the function that it is inlined into"
)]
#![allow(clippy::needless_range_loop, reason = "indices into register tiles run in step")]

mod activation;
mod attention;
mod convert;
mod cpu;
mod hadamard;
mod head;
mod isa;
mod matmul;
mod norm;
mod pool;
mod rope;
mod scratch;
mod simd;
#[cfg(test)]
mod testing;
mod weights;

pub use activation::Activation;
pub use attention::{AttentionParams, KvBits, KvMut, KvRef, PackedKv, PackedKvMut, Segment, Span};
pub use cpu::Cpu;
pub use head::{DivergenceHead, RowScore, ScoreHead};
pub use isa::Isa;
pub use matmul::{MatmulOut, Store};
pub use rope::RopeTables;
pub use weights::{FloatsMut, FloatsRef, Int8Weights, Linear, Precision, WeightsRef};
