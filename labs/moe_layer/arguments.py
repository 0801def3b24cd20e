"""Checks of the layer's arguments: ValueErrors that name the argument, its value, and what would be right."""

from __future__ import annotations

import math
from numbers import Integral, Real


def check_whole(least: int = 1, **values: object) -> None:
    """Raise ValueError unless all are whole numbers of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: a whole number of at least {least}")


def check_number(above_zero: bool = False, note: str = "", **values: object) -> None:
    """Raise ValueError, ending in `note`, unless all are finite numbers of at least 0, or above it."""
    for name, value in values.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < 0 or (above_zero and value == 0):
            raise ValueError(f"{name}={value!r}: a finite number {'above' if above_zero else 'of at least'} 0{note}")


def check_flag(**values: object) -> None:
    """Raise ValueError unless all are True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: True or False")
