//! Statistics of a whole model in one safetensors file: collected once, merged from hundreds of times.
//!
//! Tensors are `layers.{i}.{moment}` (f64) and `layers.{i}.inputs.{n}` (f32); the metadata says of which model and text
//! they are, and has a hash of each tensor, of the weights that each layer's statistics come from, and of the header itself.
//! Written layer by layer to a temporary file that takes its name, if it is still free, when it is complete; read one layer
//! at a time.

mod header;
mod reader;
mod writer;

pub use reader::StatisticsFile;
pub use writer::collect_statistics;
