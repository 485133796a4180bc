//! Gemma 3, text and images: `transformers/models/gemma3/configuration_gemma3.py` and `modeling_gemma3.py`. Its language model is
//! run, on text.

use super::{Family, gemma3_text};

pub(super) static FAMILY: Family = Family {
    model_type: "gemma3",
    base_model: "Gemma3Model",
    text_config: true,
    prefixes: &["model.language_model.", "language_model.model."],
    ..gemma3_text::TEXT
};
