"""Plans as what each layer caches: choices of a model, their bytes, texts that read back, pickles."""

from __future__ import annotations

import json
import pickle

import pytest

from mqadapt_rs import ArgumentError, ModelConfig, Plan
from mqadapt_rs._core import LayerCache

CONFIG = ModelConfig.from_json(
    json.dumps(
        {
            "model_type": "llama",
            "hidden_size": 96,
            "intermediate_size": 64,
            "vocab_size": 100,
            "num_hidden_layers": 8,
            "num_attention_heads": 12,
            "num_key_value_heads": 6,
            "head_dim": 8,
        }
    )
)


def test_choices_of_a_layer_ascend_by_bytes() -> None:
    choices = CONFIG.layer_caches(0)
    assert [choice.num_key_value_heads for choice in choices] == [1, 2, 3, 6]
    assert choices == choices[-1].reductions() == Plan.parse("keep", CONFIG).layers[0].reductions()
    sizes = [choice.bytes_per_token(CONFIG) for choice in choices]
    assert sizes == sorted(sizes) == [2 * heads * 8 * 2 for heads in (1, 2, 3, 6)]
    assert choices[0].bytes_per_token(CONFIG, 4) == 2 * sizes[0]
    with pytest.raises(ArgumentError, match="layer_idx"):
        CONFIG.layer_caches(8)


def test_a_choice_is_equal_by_content() -> None:
    assert LayerCache(2) == LayerCache(2) != LayerCache(3)
    assert {LayerCache(2): "a"}[LayerCache(2)] == "a"
    assert pickle.loads(pickle.dumps(LayerCache(3))) == LayerCache(3)  # noqa: S301
    assert str(LayerCache(1)) == "mqa"
    assert str(LayerCache(2)) == "gqa2"
    assert repr(LayerCache(2)) == "LayerCache(num_key_value_heads=2)"
    with pytest.raises(ArgumentError, match="num_key_value_heads"):
        LayerCache(0)


@pytest.mark.parametrize("text", ["keep", "mqa:0,3-5", "mqa:7; gqa2:0; gqa3:1-3,6", "gqa2:0-7"])
def test_texts_read_back(text: str) -> None:
    plan = Plan.parse(text, CONFIG)
    assert plan.describe() == text
    assert Plan.parse(plan.describe(), CONFIG) == plan
    source = Plan.parse("keep", CONFIG).layers
    assert Plan.from_layers(plan.layers, CONFIG) == Plan.from_layers(plan.layers, source) == plan
    assert sum(choice.bytes_per_token(CONFIG) for choice in plan.layers) == plan.kv_bytes_per_token(CONFIG)


def test_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArgumentError, match="4 K/V heads"):
        Plan.from_layers([LayerCache(4)] * 8, CONFIG)
    with pytest.raises(ArgumentError, match="8"):
        Plan.from_layers([LayerCache(1)] * 7, CONFIG)
