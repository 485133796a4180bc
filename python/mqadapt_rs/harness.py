"""The former name of `mqadapt_rs.lm_eval`."""

from mqadapt_rs.lm_eval import MqadaptLM, evaluate, main

__all__ = ["MqadaptLM", "evaluate", "main"]
