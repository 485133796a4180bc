"""Validation of numeric arguments. In: a value. Out: a number in its range, or an error that names the argument and the range."""

from __future__ import annotations

import math
import operator
from typing import SupportsFloat, SupportsIndex, overload

from mqadapt_rs.errors import ArgumentError

LARGEST = 2**63 - 1
"""Largest count."""
LARGEST_SEED = 2**64 - 1


@overload
def whole(name: str, value: SupportsIndex, least: int = 0, most: int = LARGEST) -> int: ...
@overload
def whole(name: str, value: SupportsIndex | None, least: int = 0, most: int = LARGEST) -> int | None: ...
def whole(name: str, value: SupportsIndex | None, least: int = 0, most: int = LARGEST) -> int | None:
    """Return a whole number from `least` to `most`, or `None` for `None`.

    Raises:
        ArgumentError: the number is out of range.
        TypeError: the value is not a whole number.
    """
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number; found {type(value).__name__}") from None
    if not least <= number <= most:
        found = number if number.bit_length() < 128 else f"a number of {number.bit_length()} bits"
        raise ArgumentError(f"{name} must be a whole number from {least} to {most}; found {found}")
    return number


def real(name: str, value: SupportsFloat, least: float = 0.0, most: float = math.inf) -> float:
    """Return a finite number from `least` to `most`.

    Raises:
        ArgumentError: the number is out of range, infinite or NaN.
        TypeError: the value is not a number.
    """
    try:
        number = float(value)
    except OverflowError:  # a whole number larger than every float
        number = math.inf
    except ValueError:  # a string
        raise TypeError(f"{name} must be a number; found {type(value).__name__}") from None
    if not (math.isfinite(number) and least <= number <= most):
        upper = "" if most == math.inf else f" to {most:g}"
        raise ArgumentError(f"{name} must be a finite number from {least:g}{upper or ' on'}; found {number}")
    return number
