"""The code book of a weight: how often each symbol comes, in units of 1/4096, and what it will cost.

Symbols too rare for a frequency of their own become escapes: they would cost the others more than 16 bits do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from bagel_compress.codecs.ecq.layout import BOOK_HEADER, ESCAPE, ESCAPE_BYTES, MAX_LOW_BITS, STATE_BITS, STATES

RARE = (0.0, 0.5, 1.0, 2.0)  # expected counts in 4096 below which a symbol becomes an escape: all are tried


@dataclass(frozen=True, slots=True)
class Book:
    """`frequencies` int64 [256] add up to 4096, ESCAPE's among them; `low_bits` are stored apart from the symbols."""

    low_bits: int
    frequencies: np.ndarray

    def stored(self) -> np.ndarray:
        """uint16 [3 + symbols]: low bits, first symbol, frequency of ESCAPE, frequencies of first to last symbol."""
        used = np.flatnonzero(self.frequencies[:ESCAPE])
        first, last = (int(used[0]), int(used[-1])) if used.size else (0, 0)
        head = [self.low_bits, first, int(self.frequencies[ESCAPE])]
        return np.array([*head, *self.frequencies[first : last + 1].tolist()], np.uint16)

    @property
    def escaping(self) -> bool:
        """Whether a symbol may be ESCAPE."""
        return bool(self.frequencies[ESCAPE])

    @property
    def symbols(self) -> int:
        """Frequencies that are stored after the book's head."""
        return self.stored().size - BOOK_HEADER


def read_book(stored: np.ndarray) -> Book | str:
    """The book of stored uint16, or what is wrong with it."""
    if stored.size <= BOOK_HEADER:
        return f"book has {stored.size} entries, expected more than {BOOK_HEADER}"
    low_bits, first, escape = (int(x) for x in stored[:BOOK_HEADER])
    frequencies = np.zeros(ESCAPE + 1, np.int64)
    if low_bits > MAX_LOW_BITS or first + stored.size - BOOK_HEADER > ESCAPE:
        return f"book begins with {low_bits} low bits and symbol {first}"
    frequencies[first : first + stored.size - BOOK_HEADER] = stored[BOOK_HEADER:]
    frequencies[ESCAPE] = escape
    if frequencies.sum() != STATES:
        return f"frequencies of the book add up to {frequencies.sum()}, expected {STATES}"
    return Book(low_bits, frequencies)


def fit(counts: np.ndarray, low_bits: int) -> tuple[Book, float]:
    """The book of least cost for int64 [256] counts of symbols (ESCAPE: what no symbol stands for); and the cost.

    The cost is bits of symbols and escapes, without low bits, book and runs.
    """
    tried = [_fit(counts, rare) for rare in RARE]
    frequencies, cost = min(tried, key=lambda found: found[1])
    return Book(low_bits, frequencies), cost


def _fit(counts: np.ndarray, rare: float) -> tuple[np.ndarray, float]:
    from bagel_compress.codecs.ecq.pack import normalise

    kept = counts.copy()
    few = counts * STATES < rare * counts.sum()
    few[ESCAPE] = False
    escaped = int(counts[few].sum())
    kept[few] = 0
    kept[ESCAPE] += escaped
    frequencies = np.zeros(ESCAPE + 1, np.int64)
    normalise(kept, frequencies)
    cost = float(kept @ costs()[frequencies]) + 8 * ESCAPE_BYTES * int(kept[ESCAPE])
    return frequencies, cost


@cache
def costs() -> np.ndarray:
    """float64 [4097]: mean bits of a symbol by its frequency; 0 for frequency 0.

    A symbol of frequency f is written from states f to 2f - 1, scaled, the state x with probability log2(1 + 1/x).
    """
    states = np.arange(1, 2 * STATES)
    bits = STATE_BITS - np.floor(np.log2(states))
    share = np.log2(1 + 1 / states)
    sums = np.concatenate([[0.0, 0.0], np.cumsum(bits * share)])  # sums[x] is over states below x
    frequency = np.arange(1, STATES + 1)
    return np.concatenate([[0.0], sums[2 * frequency] - sums[frequency]])
