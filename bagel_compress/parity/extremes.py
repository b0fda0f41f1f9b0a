"""Largest, smallest and middle value; NaN, which `max` and `min` lose in a list, comes through each. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median


def largest(values: Iterable[float]) -> float:
    """The largest value; NaN if one of them is NaN. Raises on no values."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


def smallest(values: Iterable[float]) -> float:
    """The smallest value; NaN if one of them is NaN."""
    return -largest(-value for value in values)


def middle(values: Iterable[float]) -> float:
    """The median; NaN if one of them is NaN."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else median(found)
