//! OLMo 2: `transformers/models/olmo2/configuration_olmo2.py` and `modeling_olmo2.py`.

use super::{BlockNorms, Defaults, Family, Forward, QkNorm};

pub(super) static FAMILY: Family = Family {
    model_type: "olmo2",
    class_prefix: "Olmo2",
    base_model: "Olmo2Model",
    defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
    forward: Forward { block_norms: BlockNorms::Behind, qk_norm: QkNorm::Layer, ..Forward::LLAMA },
    ..Family::LLAMA
};
