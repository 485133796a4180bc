"""Gives every layer of a pretrained transformer its own number of K/V heads, and says what that costs."""

from mqadapt_rs._core import ModelConfig, Plan, __version__
from mqadapt_rs.errors import ArgumentError, MqadaptError

__all__ = ["ArgumentError", "ModelConfig", "MqadaptError", "Plan", "__version__"]
