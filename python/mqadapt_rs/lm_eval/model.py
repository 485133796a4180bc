"""The model `mqadapt` of lm-eval (EleutherAI's harness).

In: requests of lm-eval. Out: log-likelihoods and generated text, computed by `Model` with the same tokens, windows and truncation
as the `hf` backend of lm-eval (`lm_eval/models/huggingface.py`). Importing this module registers the model; it needs the extra
`eval` and does not import PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

# this import fills the model registry of lm-eval, unless the registry has an entry; so it comes before ours
import lm_eval.models  # noqa: F401
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from mqadapt_rs import Calibration, Model, __version__, plan_settings, register_family
from mqadapt_rs.arguments import whole
from mqadapt_rs.errors import ArgumentError, MqadaptError
from mqadapt_rs.lm_eval.tokenizer import encode, load_tokenizer
from mqadapt_rs.sources import hub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook

    from mqadapt_rs import Plan

    Pair = tuple[list[int], list[int]]
    Request = tuple[tuple[str, str] | None, list[int], list[int]]

# Requests per call into Rust: many, since a call computes shared prefixes once; not all, since `--use_cache` is filled between
# calls.
_CHUNK = 8192
_MAX_GEN_TOKS = 256  # lm-eval's default


@register_model("mqadapt")
class MqadaptLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint under a plan, as a model of lm-eval.

    Args:
        pretrained: folder, `.gguf` file or hub id `org/name[@revision]`.
        plan, method, seed, dtype, device, weights, kv: as `Model.load` takes them. In lm-eval's `key=value` arguments a plan
            cannot contain commas: `mqa:0;mqa:3-7`, or the name of a plan file.
        family: the family of a model whose `model_type` is not known, as `register_family` takes it.
        tokenizer: source of the tokenizer; by default that of the model.
        max_length: largest context in tokens; by default the model's `max_position_embeddings`.
        add_bos_token: whether text starts with the special tokens of the tokenizer; by default as the tokenizer does.
        prefix_token_id: replacement of empty contexts; by default BOS, or EOS if there is no BOS.
        enable_thinking, chat_template_args: arguments of the chat template.
        think_end_token: generated text up to this token is removed.
        trust_remote_code: allow tokenizers with custom code.
        calibration: calibration of the methods that need one; `stats` names a statistics file instead.
        batch_size, max_batch_size: accepted and ignored, since requests are packed by their number of tokens.

    Raises:
        ArgumentError: the plan is illegal, or an argument does not exist.
        MqadaptError, OSError: as `Model.load`.
    """

    def __init__(
        self,
        pretrained: str,
        plan: Plan | str | Sequence[int] = "keep",
        method: str | None = None,
        seed: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        weights: str = "stored",
        kv: str | None = None,
        family: str | None = None,
        tokenizer: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        calibration: Calibration | None = None,
        stats: str | None = None,
        batch_size: int | str | None = None,  # noqa: ARG002 (lm-eval passes it to every model)
        max_batch_size: int | None = None,  # noqa: ARG002
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ArgumentError(_unknown_arguments(unknown))
        if family is not None:
            register_family(None, family)
        max_length, prefix_token_id = whole("max_length", max_length, 1), whole("prefix_token_id", prefix_token_id)
        self.pretrained = pretrained
        # lm-eval turns the flag of a one-layer model into a number
        plan = str(plan) if isinstance(plan, int) else plan
        self.method = method or plan_settings.read(plan).get("method", "mean")
        self.model = _load(
            pretrained,
            plan=plan,
            method=method,
            seed=seed,
            dtype=None if dtype == "auto" else dtype,
            device=device or "cpu",
            weights=weights,
            kv=kv,
            calibration=calibration or (Calibration(stats=stats) if stats else None),
        )
        self.tokenizer = load_tokenizer(tokenizer or pretrained, trust_remote_code, add_bos_token)
        self.max_length = int(max_length or self.model.config.max_position_embeddings)
        self.add_bos_token = add_bos_token
        self.custom_prefix_token_id = prefix_token_id
        self.think_end_token = think_end_token
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        self._encoded: dict[str, list[int]] = {}

    # properties that lm-eval reads

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token = self.tokenizer.eos_token_id
        if token is None:
            raise MqadaptError(f"{self.pretrained}: the tokenizer has no EOS token; lm-eval needs one")
        return int(token)

    @property
    def prefix_token_id(self) -> int:
        """The replacement of empty contexts."""
        for token in (self.custom_prefix_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        return self.eot_token_id

    @property
    def max_gen_toks(self) -> int:
        """The default number of generated tokens."""
        return _MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in the request cache of lm-eval."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """The facts that lm-eval writes beside the results."""
        place = hub.parse(self.pretrained)
        config = self.model.config
        return {
            "model_num_parameters": config.parameters,
            "model_dtype": self.model.dtype,
            "model_revision": place.revision if isinstance(place, hub.HubId) else None,
            "model_sha": self.model.fingerprint,
            "num_key_value_heads": config.num_key_value_heads,
            "merge_method": self.method,
            "kv_bytes_per_token": self.model.kv_bytes_per_token,
            "mqadapt_version": __version__,
        }

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Keep the answers of different models apart in `--use_cache`.

        The keys of lm-eval depend on the request alone, so that two plans with one database would share answers. Each key gets
        the identity of this model as a prefix.
        """
        database = getattr(cache_hook, "dbdict", None)
        if database is not None:
            if not hasattr(database, "encode_key"):
                raise MqadaptError("this version of lm-eval keeps its cache in a form that cannot tell models apart")
            identity = self._identity()
            database.encode_key = lambda key: f"{identity}-{key}"
            database.decode_key = lambda key: key.removeprefix(f"{identity}-")
        super().set_cache_hook(cache_hook)

    def _identity(self) -> str:
        """A hash of everything that an answer depends on except the request."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        parts = [
            self.model.fingerprint,
            __version__,
            self.max_length,
            self.prefix_token_id,
            self.add_bos_token,
            self.think_end_token,
            backend.to_str() if backend is not None else self.tokenizer_name,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    # text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Encode a text.

        Special tokens are added by `add_special_tokens`, else by `add_bos_token` and the tokenizer; never to a text that starts
        with the prefix token.
        """
        known = self._encoded.get(string) if add_special_tokens is None else None
        ids = known if known is not None else self._encode([string], add_special_tokens)[0]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode(self, strings: Sequence[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """Encode many texts at once, as `tok_encode` does."""
        prefix = self.tokenizer.decode([self.prefix_token_id])
        special = [
            add_special_tokens
            if add_special_tokens is not None
            else (False if string.startswith(prefix) else self.add_bos_token)
            for string in strings
        ]
        return encode(self.tokenizer, strings, special)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Format a conversation as a prompt. System messages are removed if the template does not support them."""
        from jinja2.exceptions import TemplateError

        def apply(messages: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    **self.chat_template_args,
                )
            )

        try:
            return apply(chat_history)
        except TemplateError:
            return apply([message for message in chat_history if message["role"] != "system"])

    # requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding gives it."""
        # lm-eval encodes the context and the full text of each request one by one; here each is encoded once, in one batch
        texts = {text for request in requests for text in (request.args[0].rstrip(), "".join(request.args))} - {""}
        ordered = sorted(texts)
        self._encoded = dict(zip(ordered, self._encode(ordered), strict=True))
        try:
            return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        # neighbours in this order share the most
        order = sorted(range(len(pairs)), key=lambda i: pairs[i][0] + pairs[i][1])
        answers: dict[int, tuple[float, bool]] = {}
        with _progress("loglikelihood", len(pairs), disable_tqdm) as progress:
            for start in range(0, len(order), _CHUNK):
                chosen = order[start : start + _CHUNK]
                found = self.model.loglikelihood([pairs[i] for i in chosen], progress=_follow(progress))
                for i, answer in zip(chosen, found, strict=True):
                    answers[i] = answer
                    text = requests[i][0]
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answer)
        return [answers[i] for i in range(len(pairs))]

    def _fit(self, context: list[int], continuation: list[int]) -> Pair:
        """Truncate the context from the left, so that all tokens except the last fit the model."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ArgumentError(
                f"a request has {len(context)} context and {len(continuation)} continuation tokens; expected at least one "
                f"of each, and at most {self.max_length} to score (max_length)"
            )
        return context[len(continuation) - self.max_length - 1 :], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each full text, in windows of the context length that overlap by one token."""
        texts = [request.args[0] for request in requests]
        windows: list[Request] = []
        owners: list[int] = []
        for owner, ids in enumerate(self._encode(texts)):
            for window in utils.get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to the first of its stop strings."""
        groups: dict[str, list[int]] = {}  # requests with the same options run together
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        out = [""] * len(requests)
        with _progress("generate_until", len(requests), disable_tqdm) as progress:
            for group in groups.values():
                options = requests[group[0]].args[1]
                contexts = [requests[i].args[0] for i in group]
                for i, text in zip(group, self._generate(contexts, options, progress), strict=True):
                    out[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return out

    def _generate(self, contexts: list[str], gen_kwargs: dict[str, Any], progress: tqdm[Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = [stop for stop in handle_stop_sequences(options.pop("until", None), eos=eos) if stop]
        max_gen_toks = options.pop("max_gen_toks")
        room = self.max_length - max_gen_toks
        if room <= 0:
            raise ArgumentError(f"max_gen_toks {max_gen_toks} leaves no room for a context in {self.max_length} tokens")
        temperature = float(options.pop("temperature", 0.0)) if options.pop("do_sample") else 0.0
        sampling = {name: options.pop(name) for name in ("top_k", "top_p", "seed") if options.get(name) is not None}
        # default values are accepted for options of other models
        unknown = {name: value for name, value in options.items() if value not in (None, False, 1, 1.0)}
        if unknown:
            raise ArgumentError(f"generation options that are not supported: {', '.join(map(str, unknown))}")

        prompts = [ids[-room:] for ids in self._encode(contexts)]
        new: list[list[int]] = [[] for _ in prompts]
        # a stop string lies within this many last tokens, since each token has at least one byte
        reach = max((len(stop.encode()) for stop in until), default=0) + 2

        def goes_on(index: int, token: int) -> bool:
            new[index].append(token)
            tail = self.tokenizer.decode(new[index][-reach:])
            return not any(stop in tail for stop in until)

        self.model.generate(
            prompts,
            max_new_tokens=max_gen_toks,
            temperature=temperature,
            stop_tokens=[*self.model.stop_tokens, self.eot_token_id],
            on_token=goes_on,
            progress=_follow(progress),
            **sampling,
        )
        texts = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new)
        return [postprocess_generated_text(text, stop=until, think_end_token=self.think_end_token) for text in texts]


def _load(src: str, device: str, **options: Any) -> Model:
    """Load a model, on the CPU if there is no GPU, as `hf` does: the command line of lm-eval always passes `cuda:0`."""
    try:
        return Model.load(src, device=device, **options)
    except ArgumentError:
        if not device.startswith("cuda"):
            raise
        model = Model.load(src, device="cpu", **options)
        logging.getLogger(__name__).warning("device %s is not available, using the CPU", device)
        return model


def _progress(what: str, total: int, disable: bool) -> tqdm[Any]:
    # None: shown on terminals only
    return tqdm(total=total, desc=f"Running {what} requests", disable=True if disable else None)


def _follow(bar: tqdm[Any]) -> Callable[[str, int, int], None]:
    """Advance a progress bar by the progress of a call into Rust."""
    start = bar.n

    def advance(_phase: str, done: int, _total: int) -> None:
        bar.update(start + done - bar.n)

    return advance


def _unknown_arguments(unknown: Iterable[str]) -> str:
    names = ", ".join(map(repr, unknown))
    return (
        f"unknown model arguments: {names}. lm-eval splits its arguments at commas: write a "
        "plan without commas (mqa:0;mqa:3-7), or pass the name of a plan file"
    )
