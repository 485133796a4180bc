"""Shrink the K/V cache of a pretrained transformer layer by layer, and measure what that costs."""

from mqadapt_rs._core import (
    Calibration,
    ConversionReport,
    HiddenStates,
    Model,
    ModelConfig,
    Plan,
    Verification,
    __version__,
    convert,
    inspect,
    register_family,
    verify,
)
from mqadapt_rs.calibration import load_calibration
from mqadapt_rs.errors import ArgumentError, MqadaptError

__all__ = [
    "ArgumentError",
    "Calibration",
    "ConversionReport",
    "HiddenStates",
    "Model",
    "ModelConfig",
    "MqadaptError",
    "Plan",
    "Verification",
    "__version__",
    "convert",
    "inspect",
    "load_calibration",
    "register_family",
    "verify",
]
