"""The lm-eval backend `mqadapt`: model, tokenizer and evaluation. Importing it registers the model; it needs the extra `eval`."""

from mqadapt_rs.lm_eval.model import MqadaptLM
from mqadapt_rs.lm_eval.run import evaluate, main

__all__ = ["MqadaptLM", "evaluate", "main"]
