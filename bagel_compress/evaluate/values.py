"""Scores before they are averaged, and the statistics over them: averages, intervals, paired differences.

A category has units (a prompt with its four pictures, a picture with its two questions), and a unit has values. The
average of a category is that of all its values. Intervals resample whole units, within each category, so that what
hangs together stays together; the difference of two models is taken over the same units, drawn together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bagel_compress.errors import BenchmarkError
from bagel_compress.scores.benchmark import BOOTSTRAP_ROUNDS, CONFIDENCE

Units = Mapping[str, Sequence[float]]  # unit -> its values


@dataclass(frozen=True, slots=True)
class Total:
    """A figure made of the averages of some categories."""

    categories: tuple[str, ...]
    how: Literal["sum", "mean"] = "mean"


@dataclass(frozen=True, slots=True)
class Values:
    """Category -> unit -> values, and the totals over categories."""

    values: Mapping[str, Units]
    totals: Mapping[str, Total]

    def names(self) -> list[str]:
        return [*self.values, *self.totals]


@dataclass(frozen=True, slots=True)
class Figure:
    """A score with its 95 % interval (bootstrap over units)."""

    value: float
    low: float
    high: float
    units: int


def figure(values: Values, name: str, seed: int = 0) -> Figure:
    """The score of a category or a total."""
    parts, how = _parts(values, name)
    drawn = _combined([_resampled(category, values.values[category], None, seed) for category in parts], how)
    value = _combined([np.array([_mean(values.values[category])]) for category in parts], how)[0]
    return Figure(float(value), *_interval(drawn), sum(len(values.values[category]) for category in parts))


def difference(ours: Values, theirs: Values, name: str, seed: int = 0) -> Figure:
    """The paired difference ours - theirs. Raises BenchmarkError if the two were not asked the same."""
    parts, how = _parts(ours, name)
    for category in parts:
        if ours.values[category].keys() != theirs.values.get(category, {}).keys():
            raise BenchmarkError(
                f"{name}: the two results were not asked the same items of {category}; run both with the same settings"
                " on the same data."
            )
    drawn = [_resampled(c, ours.values[c], theirs.values[c], seed) for c in parts]
    value = [np.array([_mean(ours.values[c]) - _mean(theirs.values[c])]) for c in parts]
    count = sum(len(ours.values[c]) for c in parts)
    return Figure(float(_combined(value, how)[0]), *_interval(_combined(drawn, how)), count)


def _parts(values: Values, name: str) -> tuple[tuple[str, ...], str]:
    total = values.totals.get(name)
    return ((name,), "mean") if total is None else (total.categories, total.how)


def _mean(units: Units) -> float:
    return float(np.mean([value for values in units.values() for value in values]))


def _resampled(category: str, ours: Units, theirs: Units | None, seed: int) -> np.ndarray:
    """Averages (or their differences) of BOOTSTRAP_ROUNDS draws of the units, [rounds]."""
    names = sorted(ours)
    rng = np.random.default_rng([seed, *category.encode()])
    draws = rng.integers(0, len(names), (BOOTSTRAP_ROUNDS, len(names)))

    def means(units: Units) -> np.ndarray:
        sums = np.array([sum(units[n]) for n in names], np.float64)
        counts = np.array([len(units[n]) for n in names])
        return sums[draws].sum(1) / counts[draws].sum(1)

    return means(ours) if theirs is None else means(ours) - means(theirs)


def _combined(parts: Sequence[np.ndarray], how: str) -> np.ndarray:
    total = np.sum(parts, axis=0)
    return total if how == "sum" else total / len(parts)


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
