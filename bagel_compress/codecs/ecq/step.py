"""The step that meets a rate, found from how often each bf16 word occurs: exact but for the coder's own small change.

A weight is one of at most 65,280 finite bf16 words, and rounding to nearest gives every word one code. So the counts of
words alone say what a step costs and how large its error is, without another look at the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bagel_compress.codecs.ecq.book import Book, fit
from bagel_compress.codecs.ecq.layout import CENTRE, ESCAPE, MAX_LOW_BITS, RUN_BITS, Sizes
from bagel_compress.codecs.matrix import as_floats
from bagel_compress.io import bf16

STEPS_PER_OCTAVE = 2048  # steps that are tried have 12 bits: 0.0007 bits a weight from one to the next
NARROW = 512  # of them, about a first guess on both sides
PLANE_GAIN = 0.002  # bits a weight that a plane of low bits must save: it takes time
GAUSSIAN = 2.0471  # log2 sqrt(2 pi e): entropy in bits of a normal variable of deviation 1
LARGEST = 2.0**126  # weights from here on have no step whose every multiple is finite


@dataclass(frozen=True, slots=True)
class StepGrid:
    """A step, the book of the codes that it gives, and the bits that all parts will hardly differ from."""

    step: float  # exactly an fp32 number
    book: Book
    bits: float


def step_at(index: int) -> float:
    """Steps in a row, STEPS_PER_OCTAVE to each power of two: exact fp32 numbers."""
    octave, place = divmod(index, STEPS_PER_OCTAVE)
    return float(np.float32((STEPS_PER_OCTAVE + place) / STEPS_PER_OCTAVE * 2.0**octave))


def index_of(step: float) -> int:
    """The nearest index below a step."""
    mantissa, exponent = np.frexp(step)
    return int((2 * mantissa - 1) * STEPS_PER_OCTAVE) + (int(exponent) - 1) * STEPS_PER_OCTAVE


def overhead(sizes: Sizes) -> float:
    """Bits beside the symbols, low bits and escapes: of the runs and of all parts but the stream."""
    parts = sizes.parts("")
    rest = sum(part.nbytes for name, part in parts.items() if not name.endswith((".stream", ".run_bytes")))
    return RUN_BITS * sizes.runs + 8 * rest


class Search:
    """Counts of the words of one weight, and what a step makes of them."""

    def __init__(self, counts: np.ndarray) -> None:
        """`counts` is int64 [65536], zero for words that are not finite."""
        self.words = np.flatnonzero(counts).astype(np.uint16)
        self.counts, self.values = counts[self.words], as_floats(self.words).astype(np.float64)
        self.weights = int(self.counts.sum())
        self.largest = float(np.abs(self.values).max())
        self.deviation = float(np.sqrt((self.values**2) @ self.counts / self.weights))

    def find(self, bits: float) -> StepGrid:
        """The finest step whose parts take at most `bits` in all, or the one of codes that are all zero."""
        if self.largest == 0.0:
            return self._grid(1.0, 0)
        low, high = self._ends()
        guess = index_of(self.deviation * 2.0 ** (GAUSSIAN - bits / self.weights))
        guess = min(max(guess, low), high)
        low_bits = self._low_bits(guess)
        found = self._bisect(bits, low_bits, low, high, guess)
        better = self._low_bits(index_of(found.step))
        return found if better == low_bits else self._bisect(bits, better, low, high, index_of(found.step))

    def _ends(self) -> tuple[int, int]:
        """Indices of a step that tells all words apart and of one that gives only zeros."""
        magnitudes = np.abs(self.values)
        finest = float(magnitudes[magnitudes > 0].min()) * 2.0**-9
        return index_of(max(finest, 2.0**-134)), index_of(self.largest * 4)  # bf16's smallest number is 2^-133

    def _bisect(self, bits: float, low_bits: int, low: int, high: int, guess: int) -> StepGrid:
        def at(index: int) -> StepGrid:
            return self._grid(step_at(index), low_bits)

        best = at(high)
        for index in (guess - NARROW, guess + NARROW):
            if low < index < high:
                found = at(index)
                if found.bits <= bits:
                    high, best = index, found
                else:
                    low = index
        while high - low > 1:
            middle = (low + high) // 2
            found = at(middle)
            if found.bits <= bits:
                high, best = middle, found
            else:
                low = middle
        return best

    def _low_bits(self, index: int) -> int:
        best, least = 0, self._grid(step_at(index), 0).bits
        for low_bits in range(1, MAX_LOW_BITS + 1):
            bits = self._grid(step_at(index), low_bits).bits
            if bits < least - PLANE_GAIN * self.weights:
                best, least = low_bits, bits
        return best

    def _grid(self, step: float, low_bits: int) -> StepGrid:
        symbols = symbols_of(np.rint(self.values / step), low_bits)  # ties to even; of any size, so float64
        counts = np.bincount(symbols, self.counts, ESCAPE + 1).astype(np.int64)
        book, cost = fit(counts, low_bits)
        sizes = Sizes(self.weights, 0, book.symbols)
        return StepGrid(step, book, cost + 8 * low_bits * -(-self.weights // 8) + overhead(sizes))


def symbols_of(codes: np.ndarray, low_bits: int) -> np.ndarray:
    """Symbols of whole-numbered codes, int64; ESCAPE for those beyond 8 bits."""
    high = np.floor(codes * 2.0**-low_bits) + CENTRE
    return np.where((high >= 0) & (high < ESCAPE), high, ESCAPE).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Tables:
    """What becomes of every bf16 word: uint8 symbols and low bits, uint16 decoded words; [65536] each.

    Words that were not counted are escapes.
    """

    symbols: np.ndarray
    lows: np.ndarray
    decoded: np.ndarray


def tables_of(grid: StepGrid, search: Search) -> Tables:
    """The codes of the words that were counted."""
    codes, words, low_bits = np.rint(search.values / grid.step), search.words, grid.book.low_bits
    symbols = symbols_of(codes, low_bits)
    symbols[grid.book.frequencies[symbols] == 0] = ESCAPE
    codes[symbols == ESCAPE] = 0
    none, same = np.zeros(1 << 16, np.uint8), np.arange(1 << 16, dtype=np.uint16)
    tables = Tables(none + np.uint8(ESCAPE), none, same)
    tables.symbols[words] = symbols
    tables.lows[words] = codes.astype(np.int64) & ((1 << low_bits) - 1)
    tables.decoded[words] = np.where(symbols == ESCAPE, words, decoded_words(codes, grid.step))
    return tables


def decoded_words(codes: np.ndarray, step: float | np.ndarray) -> np.ndarray:
    """bf16 words of code * step, the product in fp32, to nearest even."""
    whole = codes.astype(np.float32) + np.float32(0)  # a code has no sign of zero
    return bf16.rounded((whole * np.float32(step)).astype(np.float32))
