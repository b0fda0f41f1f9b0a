"""Likely size of a unit from a sample of its weights: a few milliseconds instead of a pass over the data."""

from __future__ import annotations

import numpy as np

from bagel_compress.codecs.base import Reader, Unit
from bagel_compress.codecs.df11.book import make_book
from bagel_compress.codecs.df11.layout import FIRST_POINTER, MAX_TABLES, UnitSizes
from bagel_compress.io.bf16 import as_words

RUNS = 48
RUN = 1 << 14  # weights
MARGIN = 0.01  # for the rare exponents that a sample does not see and the lines between runs
DEVIATIONS = 3.0  # standard errors of the mean over runs; rows of one matrix differ in scale, so runs do


def likely_bytes(unit: Unit, source: Reader) -> int:
    """Bytes of the unit's parts by the code lengths of the sample: mean over runs + 3 standard errors + 1 %.

    The bytes of the source (bf16) if the sample holds exponents that DF11 cannot code.
    """
    runs = np.array([_histogram(unit, source, start) for start in _starts(unit.numel)])
    counts = runs.sum(axis=0)
    if counts[FIRST_POINTER:].any() or not counts.any():
        return sum(spec.nbytes for spec in unit.specs)
    bits = runs @ make_book(counts).lengths.astype(np.int64) / runs.sum(axis=1)
    mean = bits.mean() + DEVIATIONS * bits.std() / np.sqrt(len(bits))
    stream = min(unit.numel + 1, int(unit.numel * mean * (1 + MARGIN) / 8) + 1)
    return sum(
        part.nbytes for part in UnitSizes(unit.numel, stream, MAX_TABLES, len(unit.specs)).parts(unit.name).values()
    )


def _starts(weights: int) -> list[int]:
    """First weights of the runs, spread evenly over the unit; one run if it is small."""
    if weights <= RUNS * RUN:
        return list(range(0, weights, RUN))
    return np.linspace(0, weights - RUN, RUNS).astype(int).tolist()


def _histogram(unit: Unit, source: Reader, start: int) -> np.ndarray:
    """Exponents of up to RUN weights from `start` of the unit on, within one tensor."""
    for spec in unit.specs:
        if start < spec.numel:
            words = as_words(source.read(spec, start, min(start + RUN, spec.numel)))
            return np.bincount((words >> 7) & 0xFF, minlength=256)
        start -= spec.numel
    return np.zeros(256, np.int64)
