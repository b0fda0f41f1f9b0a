"""Maximum, minimum and median of floats that return NaN if any value is NaN; Python's own may drop it. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median


def largest(values: Iterable[float]) -> float:
    """The largest value; NaN if any value is NaN. Raises ValueError if there are none."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


def smallest(values: Iterable[float]) -> float:
    """The smallest value; NaN if any value is NaN. Raises ValueError if there are none."""
    return -largest(-value for value in values)


def middle(values: Iterable[float]) -> float:
    """The median; NaN if any value is NaN. Raises StatisticsError if there are none."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else median(found)
