"""Fields of `config.json` as transformers reads them: defaults, precedence, and what it does not read at all.

Every case edits the file that transformers has written, and compares logits with what transformers makes of the same folder.
Tolerance: as in `test_parity_families.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from mqadapt_rs import Model, MqadaptError, convert, inspect
from test_parity_families import LLAMA3, assert_close

GONE = object()
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 8}
LINEAR = {"rope_type": "linear", "factor": 4.0}
# what other families compute with, and these do not
IGNORED = {
    "attn_logit_softcapping": 0.1,
    "final_logit_softcapping": 0.1,
    "query_pre_attn_scalar": 3,
    "logit_scale": 0.1,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.1,
    "embedding_multiplier": 3.0,
    "logits_scaling": 7.0,
    "pretraining_tp": 2,
    "hidden_activation": "relu",
    "use_qk_norm": True,
    "clip_qkv": 0.1,
}

NOT_READING = [family for family in tiny.FAMILIES if family not in ("gemma2", "gemma3_text", "granite")]

# (family, how the source is made, what is edited in its config.json)
FOLLOWED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "default_rope_parameters_beside_old_linear": (
        "llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                      "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5000.0}),
    "rope_scaling_takes_the_theta_with_it": (
        "llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rope_scaling": LINEAR}),
    "rope_scaling_has_a_theta": (
        "mistral", {}, {"rope_scaling": {**LINEAR, "rope_theta": 300.0}, "rope_theta": 100.0, "rope_parameters": GONE}),
    "empty_rope_scaling": (
        "qwen3", {}, {"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 300.0}}),
    "null_rope_scaling": ("gemma", {}, {"rope_scaling": None, "rope_parameters": {**LINEAR, "rope_theta": 300.0}}),
    "default_rope_scaling_beside_linear": (
        "qwen2", {}, {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LINEAR}),
    "old_dynamic": ("llama", {}, {"rope_parameters": GONE, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "old_phi3": ("phi3", {"max_position_embeddings": 256}, {
        "rope_parameters": GONE, "rope_theta": 500.0, "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [2.0] * 4}}),
    "phi3_without_its_original_length": ("phi3", {}, {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [2.0] * 4},
        "original_max_position_embeddings": GONE, "max_position_embeddings": 131072}),
    "old_gemma3": ("gemma3_text", {}, {
        "rope_parameters": GONE, "rope_theta": 500.0, "rope_local_base_freq": 70.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "old_gemma3_by_its_defaults": ("gemma3_text", {}, {
        "rope_parameters": GONE, "rope_theta": GONE, "rope_local_base_freq": GONE, "layer_types": GONE,
        "sliding_window_pattern": 2}),
    "old_olmo3": ("olmo3", {}, {"rope_parameters": GONE, "rope_theta": 700.0,
                  "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    "gemma2_without_layer_types": ("gemma2", {}, {"layer_types": GONE, "attn_logit_softcapping": GONE,
                                   "final_logit_softcapping": GONE, "query_pre_attn_scalar": GONE}),
    "smollm3_by_its_interval": ("smollm3", {}, {"no_rope_layers": GONE, "no_rope_layer_interval": 2, "layer_types": GONE,
                                "rope_parameters": GONE}),
    "smollm3_slides_where_it_does_not_rotate": ("smollm3", {}, {"use_sliding_window": True, "sliding_window": 5,
                                                "layer_types": GONE}),
    "granite_by_its_defaults": ("granite", {}, {"embedding_multiplier": GONE, "attention_multiplier": GONE,
                                "residual_multiplier": GONE, "logits_scaling": GONE}),
    "theta_alone": ("llama", {}, {"rope_parameters": GONE, "rope_theta": 200.0}),
    "llama3_without_the_original_length": (
        "llama", {}, {"rope_parameters": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}}),
    "llama3_without_any_length": (
        "llama", {}, {"rope_parameters": {k: v for k, v in LLAMA3.items() if not k.startswith("original")},
                      "max_position_embeddings": GONE}),
    "llama3_with_the_original_length_outside": (
        "llama", {}, {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32}),
    "hidden_activation_beside_hidden_act": (
        "gemma", {}, {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}),
    "hidden_activation_alone": ("gemma", {}, {"hidden_act": GONE, "hidden_activation": "silu"}),
    "hidden_act_of_the_first_gemma": ("gemma", {}, {"hidden_act": "gelu", "hidden_activation": None}),
    "no_hidden_act": ("llama", {}, {"hidden_act": GONE}),
    "mistral_has_no_biases": ("mistral", {}, {"attention_bias": True, "mlp_bias": True}),
    "gemma_has_no_mlp_bias": ("gemma", {}, {"mlp_bias": True}),
    "gemma_has_attention_biases": ("gemma", {"attention_bias": True}, {"mlp_bias": True}),
    "qwen2_has_its_own_biases": ("qwen2", {}, {"attention_bias": True, "mlp_bias": True}),
    "qwen2_has_its_own_biases_always": ("qwen2", {}, {"attention_bias": False}),
    "qwen3_has_no_mlp_bias": ("qwen3", {}, {"mlp_bias": True}),
    "kv_heads_of_a_llama": ("llama", {}, {"num_key_value_heads": GONE}),
    "kv_heads_of_a_llama_null": ("llama", {}, {"num_key_value_heads": None}),
    "kv_heads_of_a_mistral": ("mistral", WIDE, {"num_key_value_heads": GONE}),
    "kv_heads_of_a_wide_mistral": ("mistral", {**WIDE, "num_attention_heads": 16}, {"num_key_value_heads": GONE}),
    "kv_heads_of_a_gemma": (
        "gemma", {"num_attention_heads": 32, "num_key_value_heads": 16}, {"num_key_value_heads": GONE}),
    "kv_heads_of_a_qwen2": (
        "qwen2", {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 2}, {"num_key_value_heads": GONE}),
    "kv_heads_of_a_qwen3": (
        "qwen3", {"num_attention_heads": 64, "num_key_value_heads": 32, "head_dim": 2}, {"num_key_value_heads": GONE}),
    "head_dim_of_a_qwen3": ("qwen3", {"head_dim": 128}, {"head_dim": GONE}),
    "head_dim_of_a_gemma": ("gemma", {"head_dim": 256}, {"head_dim": GONE}),
    "no_flag_of_tied_embeddings_in_gemma": ("gemma", {}, {"tie_word_embeddings": GONE}),
    "layer_types_of_a_mistral": ("mistral", {"sliding_window": 5}, {"layer_types": ["sliding_attention"] * 3}),
    "layer_types_of_a_llama": ("llama", {}, {"layer_types": ["full_attention"] * 3}),
    "layer_types_of_a_qwen2": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 5},
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "max_window_layers": 0}),
    "window_without_its_flag": ("qwen3", {}, {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}),
    "no_layer_of_its_own": ("llama", {}, {"per_layer_config": {"1": {"num_key_value_heads": 6, "head_dim": 8}}}),
    "causal": ("llama", {}, {"is_causal": True, "use_bidirectional_attention": False, "partial_rotary_factor": 1.0}),
    **{f"not_read_by_{family}": (family, {}, IGNORED) for family in NOT_READING},
}  # fmt: skip

# (family, what is edited in config.json, the field that the message names)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    **{f"not_causal_{family}": (family, {"is_causal": False}, "is_causal") for family in tiny.FAMILIES},
    **{
        f"bidirectional_{family}": (family, {"use_bidirectional_attention": True}, "use_bidirectional_attention")
        for family in tiny.FAMILIES
    },
    "is_causal_null": ("llama", {"is_causal": None}, "is_causal"),
    "mistral_with_layers_of_two_kinds": (
        "mistral", {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types"),
    "mistral_with_full_layers_and_a_window": (
        "mistral", {"sliding_window": 5, "layer_types": ["full_attention"] * 3}, "layer_types"),
    "mistral_with_sliding_layers_and_no_window": (
        "mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "layer_types"),
    "llama_with_sliding_layers": ("llama", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    "llama_with_a_window": ("llama", {"sliding_window": 4}, "sliding_window"),
    "gemma_with_a_window": ("gemma", {"sliding_window": 4}, "sliding_window"),
    "qwen2_with_sliding_layers_and_no_window": (
        "qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3}, "layer_types"),
    "too_few_layer_types": ("mistral", {"layer_types": ["sliding_attention"]}, "layer_types"),
    "chunked": ("llama", {"attention_chunk_size": 4}, "attention_chunk_size"),
    "partial_rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial_rotary_inside": (
        "llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "rope_by_kind_of_layer": (
        "qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
    "rope_type_of_two_minds": (
        "llama", {"rope_parameters": GONE, "rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
        "rope_scaling.type"),
    "rope_type_not_a_name": ("llama", {"rope_parameters": {"rope_type": 5, "rope_theta": 1e4}}, "rope_type"),
    "rope_that_old_files_ask_for": (
        "llama", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "proportional", "factor": 2.0}},
        "rope_type"),
    **{f"rope_{kind}": ("llama", {"rope_scaling": {"rope_type": kind, "factor": 2.0}}, "rope_type")
       for kind in ("proportional", "su")},
    **{f"rope_{kind}_of_phi3": ("phi3", {"rope_scaling": {"rope_type": kind, "factor": 2.0}}, "rope_type")
       for kind in ("linear", "dynamic", "llama3")},
    "yarn_without_a_factor": ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "factor"),
    "longrope_without_factors": ("phi3", {"rope_scaling": {"rope_type": "longrope"}}, "long_factor"),
    "longrope_of_another_width": (
        "llama", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "long_factor"),
    "rope_of_no_kind_of_layer": (
        "gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters.rope_type"),
    "sliding_layers_without_a_window": ("gemma2", {"sliding_window": None}, "sliding_window"),
    "starcoder2_without_biases": ("starcoder2", {"use_bias": False}, "use_bias"),
    "no_rope_layers_too_short": ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
    "sliding_layers_of_smollm3_without_the_flag": (
        "smollm3", {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3}, "layer_types"),
    "a_layer_of_another_width": ("llama", {"per_layer_config": {"1": {"intermediate_size": 40}}},
                                 "per_layer_config.1.intermediate_size"),
    "a_layer_with_a_window": ("mistral", {"per_layer_config": {"1": {"sliding_window": 3}}},
                              "per_layer_config.1.sliding_window"),
    "kv_heads_that_the_default_does_not_fit": ("mistral", {"num_key_value_heads": GONE}, "num_key_value_heads"),
    **{f"quantised_{method}": ("llama", {"quantization_config": {"quant_method": method, "bits": 4}}, method)
       for method in ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "torchao", "mxfp4")},
    "quantised_somehow": ("llama", {"quantization_config": {"bits": 4}}, "quant_method"),
}  # fmt: skip


def edit(folder: Path, **changes: Any) -> Path:
    """The folder, with other fields in its `config.json`."""
    description = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {name: value for name, value in description.items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize("case", FOLLOWED)
def test_followed(case: str, tmp_path: Path) -> None:
    family, made, changes = FOLLOWED[case]
    folder = edit(tiny.save(tmp_path / "model", family, **made), **changes)
    ids = tiny.ids(60)
    ours = Model.load(folder)
    assert_close(ours.logits(ids), tiny.logits(tiny.load(folder), ids), "logits")
    # and what is written says the same to both
    convert(folder, tmp_path / "converted", plan="mqa:all", sync=False)
    converted = Model.load(tmp_path / "converted").logits(ids)
    assert_close(converted, tiny.logits(tiny.load(tmp_path / "converted"), ids), "converted")
    assert (converted == Model.load(folder, plan="mqa:all").logits(ids)).all()


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    family, changes, word = REFUSED[case]
    folder = edit(tiny.save(tmp_path / "model", family), **changes)
    for call in (
        lambda: Model.load(folder),
        lambda: inspect(folder),
        lambda: convert(folder, tmp_path / "converted", plan="keep"),
    ):
        with pytest.raises(MqadaptError) as caught:
            call()
        message = str(caught.value)
        assert "config.json" in message and word in message and len(message) < 600, message
    assert not (tmp_path / "converted").exists()
