//! OLMo 3: `transformers/models/olmo3/configuration_olmo3.py` and `modeling_olmo3.py`.

use super::{BlockNorms, Defaults, Family, Forward, QkNorm, Rotary, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "olmo3",
    class_prefix: "Olmo3",
    base_model: "Olmo3Model",
    defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 500_000.0, sliding_window: Some(4096), ..Defaults::LLAMA },
    forward: Forward {
        block_norms: BlockNorms::Behind,
        qk_norm: QkNorm::Layer,
        windows: Windows::Pattern { full_every: 4, field: None },
        rotary: Rotary::ByKind { local_theta: 500_000.0, local_field: None },
        ..Forward::LLAMA
    },
    ..Family::LLAMA
};
