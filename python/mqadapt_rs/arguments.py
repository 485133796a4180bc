"""Numbers that callers give. In: whatever they gave. Out: the number, or an error that names the argument and its range."""

from __future__ import annotations

import math
import operator
from typing import SupportsFloat, SupportsIndex, overload

from mqadapt_rs.errors import ArgumentError

LARGEST = 2**63 - 1
"""Most of anything."""
LARGEST_SEED = 2**64 - 1


@overload
def whole(name: str, value: SupportsIndex, least: int = 0, most: int = LARGEST) -> int: ...
@overload
def whole(name: str, value: SupportsIndex | None, least: int = 0, most: int = LARGEST) -> int | None: ...
def whole(name: str, value: SupportsIndex | None, least: int = 0, most: int = LARGEST) -> int | None:
    """A whole number from `least` to `most`, or the `None` that was given.

    Raises:
        ArgumentError: it is outside.
        TypeError: it is no whole number.
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
    """A finite number from `least` to `most`.

    Raises:
        ArgumentError: it is outside, infinite or no number (NaN).
        TypeError: it is of another type.
    """
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        number = math.inf
    except ValueError:  # a text
        raise TypeError(f"{name} must be a number; found {type(value).__name__}") from None
    if not (math.isfinite(number) and least <= number <= most):
        upper = "" if most == math.inf else f" to {most:g}"
        raise ArgumentError(f"{name} must be a finite number from {least:g}{upper or ' on'}; found {number}")
    return number
