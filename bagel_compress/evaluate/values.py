"""Scores before they are averaged, and the statistics over them: averages, intervals, paired differences.

A category has units (a prompt with its four pictures, a picture with its two questions), and a unit has values. The
average of a category is that of all its values. Intervals resample whole units, within each category, so that what
hangs together stays together; the difference of two models is taken over the same units, drawn together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bagel_compress.errors import BenchmarkError
from bagel_compress.evaluate.items import MAX_DAMAGED
from bagel_compress.io.yaml_model import FrozenModel
from bagel_compress.parity.report_data import read_json, write_json
from bagel_compress.scores.benchmark import BOOTSTRAP_ROUNDS, CONFIDENCE
from bagel_compress.scores.evaluation_report import Score

VALUES = "values.json"
UNPAIRED = 2 * MAX_DAMAGED  # share of units that one of two runs may lack: each may leave out as many as are damaged
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
    """The paired difference ours - theirs, over the units that both have: either run may have left out a few.

    Raises BenchmarkError if the two were not asked the same.
    """
    parts, how = _parts(ours, name)
    pairs = [(c, *_paired(ours.values[c], theirs.values.get(c, {}))) for c in parts]
    all_units = sum(len(ours.values[c].keys() | theirs.values.get(c, {}).keys()) for c in parts)
    count = sum(len(own) for _, own, _ in pairs)
    if all_units - count > UNPAIRED * all_units or not all(own for _, own, _ in pairs):
        raise BenchmarkError(
            f"{name}: the two results have {count} of {all_units} items in common; run both with the same settings on"
            " the same data."
        )
    drawn = [_resampled(c, own, other, seed) for c, own, other in pairs]
    value = [np.array([_mean(own) - _mean(other)]) for _, own, other in pairs]
    return Figure(float(_combined(value, how)[0]), *_interval(_combined(drawn, how)), count)


def scored(values: Values, official: Mapping[str, float], against: Values | None = None) -> tuple[Score, ...]:
    """Every figure, totals first; with `against` the paired differences. Raises BenchmarkError if they do not pair."""
    rows = []
    for name in [*values.totals, *values.values]:
        found = figure(values, name)
        row: dict[str, Any] = {"official": official.get(name)}
        if against is not None:
            delta = difference(values, against, name)
            row |= {"delta": delta.value, "delta_low": delta.low, "delta_high": delta.high}
        rows.append(Score(name=name, value=found.value, low=found.low, high=found.high, units=found.units, **row))
    return tuple(rows)


class _StoredTotal(FrozenModel):
    categories: tuple[str, ...]
    how: Any


class _StoredValues(FrozenModel):
    values: dict[str, dict[str, tuple[float, ...]]]
    totals: dict[str, _StoredTotal]


def save_values(values: Values, out: Path) -> None:
    """OUT/values.json: every unit's values, for a later comparison."""
    totals = {n: _StoredTotal(categories=t.categories, how=t.how) for n, t in values.totals.items()}
    write_json(_StoredValues(values={c: {u: tuple(v) for u, v in units.items()} for c, units in values.values.items()},
                             totals=totals), out / VALUES)  # fmt: skip


def load_values(out: Path) -> Values:
    """Raises BenchmarkError if the folder holds no scored run."""
    if not (out / VALUES).is_file():
        raise BenchmarkError(f"{out} holds no scores ({VALUES} is missing); finish and score that run first.")
    stored = read_json(_StoredValues, out / VALUES)
    return Values(stored.values, {n: Total(t.categories, t.how) for n, t in stored.totals.items()})


def _parts(values: Values, name: str) -> tuple[tuple[str, ...], str]:
    total = values.totals.get(name)
    return ((name,), "mean") if total is None else (total.categories, total.how)


def _paired(ours: Units, theirs: Units) -> tuple[Units, Units]:
    """Those of the same names."""
    return {n: v for n, v in ours.items() if n in theirs}, {n: v for n, v in theirs.items() if n in ours}


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
