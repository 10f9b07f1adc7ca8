"""Ranges of numbers that are given, checked in one place."""

from __future__ import annotations

import math


def positive(name: str, value: float, usual: float | str) -> None:
    """Raises ValueError naming the field, the value and a usual one unless the value is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: {value} must be finite and above 0; {usual} is usual")


def not_negative(name: str, value: float, hint: str = "0 turns it off") -> None:
    """Raises ValueError naming the field, the value and the hint unless the value is finite and at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: {value} must be finite and ≥ 0; {hint}")
