"""GGUF sources: the tokenizer gives the original's ids, the weights are those that llama.cpp's own package reads."""

from __future__ import annotations

import hashlib
import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import mqadapt_rs
import tiny
from models import smollm2_gguf
from real import once

gguf = pytest.importorskip("gguf", reason="the package gguf (extra `test`) is not installed")

# llama.cpp recognises a pre-tokenizer by the ids of this text (`CHK_TXT` of its convert_hf_to_gguf_update.py): their
# SHA-256 under the tokenizer that HuggingFaceTB publishes for SmolLM and SmolLM2 is in its list under `smollm`.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
CHECK_SHA256 = "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"

TEXTS = [
    "Hello world! 123",
    "  two   spaces,  then 42 and\ta tab\r\n\n\nend ",
    "Café déjà vu, naïve — “quotes”",
    "e\u0301 is decomposed, 한국어 日本語 Русский",
    "🦙👩\u200d👩\u200d👧 and ١٢٣ ½ ⅷ",
    "<|im_start|>user\nHi<|im_end|>\n",
]


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a folder with f32 weights."""
    return once(
        tmp_path_factory,
        "gguf-imported",
        lambda folder: mqadapt_rs.convert(smollm2_gguf(), folder, plan="keep", dtype="float32", sync=False),
    )


def test_ids_are_those_of_the_original_tokenizer(imported: Path) -> None:
    tokenizer = Tokenizer.from_file(str(imported / "tokenizer.json"))
    ids = tokenizer.encode(CHECK_TEXT).ids
    assert hashlib.sha256(str(ids).encode()).hexdigest() == CHECK_SHA256


def test_digits_are_cut_before_spaces_are_joined(imported: Path) -> None:
    # where GPT-2's expression alone, without Digits before it, gives "Ġ", "Ġ", "7"
    tokens = Tokenizer.from_file(str(imported / "tokenizer.json")).encode("a  7").tokens
    assert tokens == ["a", "ĠĠ", "7"]


def test_transformers_reads_the_same_tokenizer(imported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(imported)
    ours = Tokenizer.from_file(str(imported / "tokenizer.json"))
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ids == ours.encode(text).ids
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    prompt = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_weights_are_what_the_gguf_package_dequantises(imported: Path) -> None:
    from safetensors import safe_open

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_gguf()).tensors}
    heads = {"attn_q": 9, "attn_k": 3}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm"}
    with safe_open(imported / "model.safetensors", "np") as ours:
        for layer in (0, 29):
            for name, module in names.items():
                tensor = stored[f"blk.{layer}.{name}.weight"]
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                if name in heads:  # undo convert_hf_to_gguf's permute
                    n = heads[name]
                    values = values.reshape(n, len(values) // n // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
                np.testing.assert_array_equal(ours.get_tensor(f"model.layers.{layer}.{module}.weight"), values)
        tensor = stored["token_embd.weight"]
        values = gguf.quants.dequantize(tensor.data[:100], tensor.tensor_type)
        np.testing.assert_array_equal(ours.get_slice("model.embed_tokens.weight")[:100], values)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(mqadapt_rs.MqadaptError, match="is 'falcon'; supported are llama, qwen2"):
        mqadapt_rs.convert(tmp_path / "model.gguf", tmp_path / "out", plan="keep")
    assert not (tmp_path / "out").exists()


def _stories_tokens(path: Path) -> tuple[list[bytes], list[float]]:
    """llama2.c's format: for each token a score, a length and the text."""
    tokens, scores = [], []
    with path.open("rb") as file:
        file.read(4)
        while head := file.read(8):
            score, length = struct.unpack("<fi", head)
            scores.append(score)
            tokens.append(file.read(length))
    return tokens, scores


def _sentencepiece(text: str, tokens: list[bytes], scores: list[float]) -> list[int]:
    """SentencePiece's own rule, the slow way: join the neighbours that make the token of the highest score."""
    known = {token.decode(): i for i, token in enumerate(tokens) if i >= 259}
    pieces = list(" " + text)
    while True:
        joined = [(scores[known[a + b]], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in known]
        if not joined:
            break
        at = -max(joined)[1]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    ids = [[known[piece]] if piece in known else [byte + 3 for byte in piece.encode()] for piece in pieces]
    return [1] + [i for piece in ids for i in piece]


def test_sentencepiece_gives_the_ids_of_its_own_rule(tmp_path: Path, shared: Path) -> None:
    stories = shared / "data/checkpoints/stories260K"
    tokens, scores = _stories_tokens(stories / "tok512.bin")
    special = ["<unk>", "<s>", "</s>"]
    texts = special + [f"<0x{byte:02X}>" for byte in range(256)]
    texts += [token.decode().replace(" ", "▁") for token in tokens[259:]]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(texts) - 259)
    tiny.write_gguf(tmp_path / "tiny.gguf", texts, scores, kinds)
    mqadapt_rs.convert(tmp_path / "tiny.gguf", tmp_path / "out", plan="keep", sync=False)

    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    for text in [(stories / "greedy.txt").read_text(), *TEXTS[:5]]:
        ids = tokenizer.encode(text).ids
        assert ids == _sentencepiece(text, tokens, scores)
        assert tokenizer.decode(ids) == text
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["add_bos_token"] is True
