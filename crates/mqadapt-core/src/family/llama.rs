//! Llama: `transformers/models/llama/configuration_llama.py` and `modeling_llama.py`.

use super::Family;

pub(super) static FAMILY: Family = Family::LLAMA;
