"""Our forward pass beside PyTorch's (transformers) and llama.cpp's, in one process, taking turns: the machine may be shared
and noisy, so only ratios of one run mean anything.

    python benches/peers.py MODEL [--dtype bfloat16] [--repeat 5] [--hellaswag 200 --tasks ../shared/tasks] [--json]

In: a folder in Hugging Face layout, or a GGUF file of ours to import first. Out: for every kind of work the best time of each
engine, and by how much ours is ahead. transformers with PyTorch, llama.cpp (`pip install --no-binary llama-cpp-python
llama-cpp-python`, so that it is compiled for this machine, and `gguf`) and lm-eval each take part if installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import mqadapt_rs

STEPS = 32  # decode steps of a run
PREFILL = [512, 2048]
DEPTHS = [64, 2048]
DEEP = 8192


def cores() -> int:
    return len(os.sched_getaffinity(0))


def ids(count: int, vocab_size: int) -> list[int]:
    return [token * 7919 % (vocab_size - 1000) + 500 for token in range(count)]


class Engine(ABC):
    """One way to run the model. Times are in seconds; of decode, the mean of the steps of one run."""

    name: str

    @abstractmethod
    def prefill(self, tokens: int) -> float: ...

    @abstractmethod
    def decode(self, depth: int) -> float: ...


class Ours(Engine):
    name = "mqadapt-rs"

    def __init__(self, folder: Path, dtype: str, plan: str = "keep") -> None:
        self.model = mqadapt_rs.Model.load(folder, plan=plan, method="mean", dtype=dtype)

    def prefill(self, tokens: int) -> float:
        return self.model.measure_prefill(tokens, 1)[0]

    def decode(self, depth: int) -> float:
        return sum(self.model.measure_decode(depth, STEPS)) / STEPS


class Transformers(Engine):
    name = "transformers"

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(cores())
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def _ids(self, count: int) -> Any:
        return self.torch.tensor([ids(count, self.model.config.vocab_size)])

    def prefill(self, tokens: int) -> float:
        x = self._ids(tokens)
        with self.torch.inference_mode():
            started = time.perf_counter()
            self.model(x, logits_to_keep=1)
            return time.perf_counter() - started

    def decode(self, depth: int) -> float:
        with self.torch.inference_mode():
            out = self.model(self._ids(depth), use_cache=True, logits_to_keep=1)
            started = time.perf_counter()
            for _ in range(STEPS):
                token = out.logits[:, -1:].argmax(-1)
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            return (time.perf_counter() - started) / STEPS


class LlamaCpp(Engine):
    name = "llama.cpp"

    def __init__(self, folder: Path, dtype: str, scratch: Path) -> None:
        import llama_cpp

        self.lib = llama_cpp
        path = scratch / "peer.gguf"
        write_gguf(folder, dtype, path)
        llama_cpp.llama_backend_init()
        # its log goes to stderr by the page
        self.silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silent, None)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit("llama.cpp cannot load the model that was written for it")

    def _context(self, tokens: int) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx = tokens + STEPS + 8
        params.n_batch = 2048
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = cores()
        return self.lib.llama_init_from_model(self.model, params)

    def _run(self, context: Any, tokens: list[int]) -> None:
        array = (self.lib.llama_token * len(tokens))(*tokens)
        if self.lib.llama_decode(context, self.lib.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama.cpp failed")

    def prefill(self, tokens: int) -> float:
        context = self._context(tokens)
        x = ids(tokens, 49000)
        self._run(context, x[:8])  # what is allocated at first use
        self.lib.llama_memory_clear(self.lib.llama_get_memory(context), True)
        started = time.perf_counter()
        self._run(context, x)
        self.lib.llama_get_logits_ith(context, -1)
        seconds = time.perf_counter() - started
        self.lib.llama_free(context)
        return seconds

    def decode(self, depth: int) -> float:
        context = self._context(depth)
        x = ids(depth, 49000)
        for first in range(0, depth, 2048):
            self._run(context, x[first : first + 2048])
        started = time.perf_counter()
        for step in range(STEPS):
            self._run(context, [500 + step])
            self.lib.llama_get_logits_ith(context, -1)
        seconds = time.perf_counter() - started
        self.lib.llama_free(context)
        return seconds / STEPS


def write_gguf(folder: Path, dtype: str, path: Path) -> None:
    """The checkpoint as llama.cpp reads it: the same weights in the same dtype, a vocabulary without a tokenizer."""
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    kind = {
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "float16": gguf.GGMLQuantizationType.F16,
        "float32": gguf.GGMLQuantizationType.F32,
    }[dtype]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:  # llama.cpp rotates neighbours, not halves
                tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        own = gguf.GGMLQuantizationType.F32 if tensor.dim() == 1 else kind
        data = gguf.quants.quantize(tensor.numpy(), own)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def take_turns(engines: list[Engine], repeat: int) -> list[dict[str, Any]]:
    rows = []
    work = [("prefill", "prefill", tokens) for tokens in PREFILL] + [
        ("decode", "decode at depth", depth) for depth in DEPTHS
    ]
    for method, label, size in work:
        best = {engine.name: float("inf") for engine in engines}
        for _ in range(repeat):
            for engine in engines:
                best[engine.name] = min(best[engine.name], getattr(engine, method)(size))
        tokens = size if method == "prefill" else 1
        rows.append({"work": f"{label} {size}", "tokens_per_second": {name: tokens / s for name, s in best.items()}})
        show(rows[-1])
    return rows


def all_mqa(source: Ours, folder: Path, dtype: str, repeat: int) -> dict[str, Any]:
    """Every layer MQA against the source, deep in a text, and what the bytes read say."""
    mqa = Ours(folder, dtype, "mqa:all")
    best = {"mqadapt-rs": float("inf"), "source": float("inf")}
    for _ in range(repeat):
        best["mqadapt-rs"] = min(best["mqadapt-rs"], mqa.decode(DEEP))
        best["source"] = min(best["source"], source.decode(DEEP))
    bytes_ratio = source.model.bytes_per_step(DEEP) / mqa.model.bytes_per_step(DEEP)
    row = {
        "work": f"decode at depth {DEEP}, every layer MQA",
        "tokens_per_second": {name: 1 / s for name, s in best.items()},
        "bytes_ratio": bytes_ratio,
    }
    show(row)
    return row


def hellaswag(folder: Path, dtype: str, limit: int, tasks: str) -> dict[str, Any]:
    """Wall time inside the model for one lm-eval task: ours, and lm-eval's `hf` at its best batch size."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from mqadapt_rs.lm_eval import MqadaptLM

    torch.set_num_threads(cores())
    manager = TaskManager(include_path=tasks)

    def seconds(model: Any) -> float:
        inner, spent = model._loglikelihood_tokens, [0.0]

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            out = inner(*args, **kwargs)
            spent[0] += time.perf_counter() - started
            return out

        model._loglikelihood_tokens = timed
        out = lm_eval.simple_evaluate(
            model=model, tasks=["hellaswag_indomain"], limit=limit, task_manager=manager, bootstrap_iters=0
        )
        scores = out["results"]["hellaswag_indomain"]
        print(f"  {type(model).__name__}: {spent[0]:.2f} s, acc_norm {scores['acc_norm,none']:.4f}", file=sys.stderr)
        model._loglikelihood_tokens = inner
        return spent[0]

    ours = min(seconds(MqadaptLM(str(folder), dtype=dtype)) for _ in range(2))
    times = {
        size: seconds(HFLM(pretrained=str(folder), dtype=dtype, batch_size=size, device="cpu")) for size in (1, 8, 32)
    }
    size = min(times, key=lambda size: times[size])
    row = {
        "work": f"HellaSwag, {limit} documents (hf: batch size {size})",
        "tokens_per_second": {"mqadapt-rs": limit / ours, "transformers": limit / times[size]},
    }
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    speeds = row["tokens_per_second"]
    ours = speeds["mqadapt-rs"]
    others = [f"{name} {speed:8.1f} ({ours / speed:.2f}x)" for name, speed in speeds.items() if name != "mqadapt-rs"]
    bytes_ratio = f"   bytes say {row['bytes_ratio']:.2f}x" if "bytes_ratio" in row else ""
    print(f"{row['work']:42} ours {ours:8.1f} /s   " + "   ".join(others) + bytes_ratio, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--hellaswag", type=int, default=0, metavar="DOCUMENTS")
    parser.add_argument("--tasks", default="../shared/tasks", help="where the task hellaswag_indomain is")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        mqadapt_rs.convert(args.model, folder, plan="keep", dtype=args.dtype)
        ours = Ours(folder, args.dtype)
        engines: list[Engine] = [ours]
        if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            engines.append(Transformers(folder, args.dtype))
            if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
                engines.append(LlamaCpp(folder, args.dtype, Path(scratch)))
        print(
            f"{args.dtype}, {cores()} cores, best of {args.repeat}: " + ", ".join(e.name for e in engines),
            file=sys.stderr,
        )
        rows = take_turns(engines, args.repeat)
        rows.append(all_mqa(ours, folder, args.dtype, args.repeat))
        if args.hellaswag:
            rows.append(hellaswag(folder, args.dtype, args.hellaswag, args.tasks))
    if args.json:
        print(json.dumps({"dtype": args.dtype, "cores": cores(), "rows": rows}))


if __name__ == "__main__":
    main()
