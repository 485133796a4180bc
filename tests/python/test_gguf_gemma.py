"""Gemma 3 270M, a published GGUF file: ids, weights, configuration and text after the import."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import mqadapt_rs
import tiny
from hard_text import hard_texts
from models import gemma3_270m_gguf
from real import once

pytest.importorskip("gguf", reason="the package gguf (extra `test`) is not installed")

from gguf_files import GgufFile
from llama_cpp_rule import LlamaCpp

pytestmark = pytest.mark.slow

SPECIAL = ("<start_of_turn>", "<end_of_turn>", "<unused7>", "<b>", "</table>", "[multimodal]", "\n\n", "   ", "\t\t")


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file as a folder, in bfloat16. Its layers have one K/V head, so the plan changes nothing."""
    return once(
        tmp_path_factory,
        "gemma-imported",
        lambda folder: mqadapt_rs.convert(gemma3_270m_gguf(), folder, plan="mqa:all", sync=False),
    )


def test_ids_are_those_of_llama_cpp(imported: Path) -> None:
    ours, llama_cpp = Tokenizer.from_file(str(imported / "tokenizer.json")), LlamaCpp(gemma3_270m_gguf())
    # spaces beside a `▁` of the text are one run for SentencePiece, as here, but not for llama.cpp
    texts = [text for text in hard_texts(SPECIAL, 300) if "▁" not in text]
    different = [text for text in texts if ours.encode(text, add_special_tokens=False).ids != llama_cpp.encode(text)]
    assert different == []
    ids = [ours.encode(text).ids for text in texts]
    assert all(own[0] == 2 for own in ids)  # <bos>
    assert ours.decode_batch([own[1:] for own in ids], skip_special_tokens=False) == texts


def test_transformers_reads_the_same_tokenizer(imported: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(imported), Tokenizer.from_file(str(imported / "tokenizer.json"))
    for text in hard_texts(SPECIAL, 50):
        assert theirs(text).input_ids == ours.encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (2, 1, 0, 3)


def test_configuration_is_that_of_gemma(imported: Path) -> None:
    found = json.loads((imported / "config.json").read_text())
    full = [layer for layer, kind in enumerate(found["layer_types"]) if kind == "full_attention"]
    assert (found["model_type"], found["architectures"], full) == ("gemma3_text", ["Gemma3ForCausalLM"], [5, 11, 17])
    expected = {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "max_position_embeddings": 32768,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
    }
    assert {field: found[field] for field in expected} == expected


def test_weights_are_what_the_package_gguf_dequantises(imported: Path) -> None:
    from safetensors import safe_open

    stored = GgufFile(gemma3_270m_gguf()).tensors
    names = {
        "attn_q.weight": "self_attn.q_proj.weight",
        "attn_v.weight": "self_attn.v_proj.weight",
        "attn_output.weight": "self_attn.o_proj.weight",
        "ffn_down.weight": "mlp.down_proj.weight",
        "attn_k_norm.weight": "self_attn.k_norm.weight",
        "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    }
    kinds = set()
    with safe_open(imported / "model.safetensors", "pt") as ours:
        for layer in (0, 17):
            for theirs, own in names.items():
                tensor = stored[f"blk.{layer}.{theirs}"]
                kinds.add(tensor.kind.name)
                values = torch.from_numpy(tensor.values() - np.float32("norm" in theirs))
                found = ours.get_tensor(f"model.layers.{layer}.{own}")
                assert torch.equal(found, values if "norm" in theirs else values.bfloat16())
        rows = stored["token_embd.weight"].values(slice(100_000, 101_000))
        found = ours.get_slice("model.embed_tokens.weight")[100_000:101_000]
        assert torch.equal(found, torch.from_numpy(rows).bfloat16())
    assert kinds == {"F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K"}


def test_the_imported_model_knows_a_text(imported: Path) -> None:
    text = "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their Creator"
    ids = torch.tensor([Tokenizer.from_file(str(imported / "tokenizer.json")).encode(text).ids])
    model = tiny.load(imported)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 1.5  # nats per token


def test_perplexity_is_that_of_transformers(imported: Path) -> None:
    """One window of 600 tokens, longer than the layers' windows of 512."""
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    ids = Tokenizer.from_file(str(imported / "tokenizer.json")).encode(text).ids[:600]
    assert len(ids) == 600
    # in f64: sums over 262144 tokens of the vocabulary
    scores = torch.from_numpy(tiny.logits(tiny.load(imported), ids)).double()
    wanted = torch.nn.functional.cross_entropy(scores[:-1], torch.tensor(ids[1:])).exp().item()
    assert mqadapt_rs.Model.load(imported, dtype="float32").perplexity(ids, context=600) == pytest.approx(
        wanted, rel=1e-5
    )


def test_there_is_nothing_to_merge(imported: Path) -> None:
    manifest = json.loads((imported / "mqadapt.json").read_text())
    assert manifest["num_key_value_heads_before"] == manifest["num_key_value_heads_after"] == [1] * 18
    assert not any(manifest["relative_error"])
