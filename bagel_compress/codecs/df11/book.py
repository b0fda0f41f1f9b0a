"""The Huffman book of a unit and its decode tables, exactly as the `dfloat11` package numbers them.

Ties in the heap, the order of the tables and the filling of unused slots all show in the bytes, so they are part of the
format here. Where that package's book could not be decoded by its own kernel (codes over 32 bits by a tie in numpy's
partition, over 16 child tables, blocks over the kernel's shared memory, an empty first slot) a flatter or fuller valid
book is made, which its reader decodes as well.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bagel_compress.codecs.df11.layout import FIRST_POINTER, MAX_CODE_BITS, MAX_TABLES, WINDOW_BITS

EOF = -1  # counted once and sorted below every exponent; written only as padding of the last byte


@dataclass(frozen=True, slots=True)
class Code:
    symbol: int
    bits: int
    value: int


@dataclass(frozen=True, slots=True)
class HuffmanBook:
    """`codes` in the package's order, end-of-stream included; `luts` uint8 [tables + 1, 256]."""

    codes: tuple[Code, ...]
    luts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Code bits per exponent, uint8 [256]; 0 where unused."""
        return self.luts[-1]

    @property
    def values(self) -> np.ndarray:
        """Code values per exponent, uint32 [256]."""
        values = np.zeros(256, np.uint32)
        for code in self.codes:
            if code.symbol != EOF:
                values[code.symbol] = code.value
        return values

    @property
    def shortest(self) -> int:
        return min(code.bits for code in self.codes if code.symbol != EOF)

    def padding(self, hole: int) -> int:
        """The `hole` (1 to 7) bits that fill the last byte: the front of the end-of-stream code, then zeros."""
        eof = next(code for code in self.codes if code.symbol == EOF)
        return eof.value >> (eof.bits - hole) if eof.bits >= hole else eof.value << (hole - eof.bits)

    def without_pointers(self) -> HuffmanBook:
        """The same book with every slot below the end-of-stream code holding an exponent (see `stalls`)."""
        return HuffmanBook(self.codes, _luts(self.codes, fill=_first_symbol(self.codes)))


def make_book(counts: np.ndarray, at_least_two_bits: bool = False) -> HuffmanBook:
    """Book for int64 [256] counts of exponents, all below 240, at least one of them above zero.

    The rarest exponents are counted as 1, two of them, three, ..., until the kernel's limits hold; the package does
    the same for the code length alone. `at_least_two_bits` bounds a block to 16,384 weights.
    """
    weights = _spread(counts) if at_least_two_bits else counts
    present = np.flatnonzero(weights)
    order = present[np.argsort(weights[present], kind="stable")]
    for flat in (0, *range(2, len(order) + 1)):
        limited = weights.copy()
        limited[order[:flat]] = 1
        codes = huffman(limited)
        if _fits(codes, counts):
            return HuffmanBook(codes, _luts(codes))
    raise AssertionError("equal counts give codes of at most 8 bits, which fit")


def huffman(counts: np.ndarray) -> tuple[Code, ...]:
    """Merges the two smallest (count, first symbol) until one is left; the smaller one's codes get a 0 in front."""
    heap = [(int(counts[s]), int(s), [Code(int(s), 0, 0)]) for s in np.flatnonzero(counts)]
    heap.append((1, EOF, [Code(EOF, 0, 0)]))
    heapq.heapify(heap)
    while len(heap) > 1:
        count0, first, zeros = heapq.heappop(heap)
        count1, _, others = heapq.heappop(heap)
        merged = [Code(c.symbol, c.bits + 1, c.value) for c in zeros]
        merged += [Code(c.symbol, c.bits + 1, c.value + (1 << c.bits)) for c in others]
        heapq.heappush(heap, (count0 + count1, first, merged))
    return tuple(heap[0][2])


def _fits(codes: Sequence[Code], counts: np.ndarray) -> bool:
    """Code lengths, number of tables, and the size that plans are told: at most 8 bits per weight."""
    total = sum(code.bits * int(counts[code.symbol]) for code in codes if code.symbol != EOF)
    longest = max(code.bits for code in codes)
    return longest <= MAX_CODE_BITS and len(_prefixes(codes)) <= MAX_TABLES and total <= 8 * (int(counts.sum()) + 1)


def _spread(counts: np.ndarray) -> np.ndarray:
    """Counts under which no exponent gets a one-bit code: frequent ones count less, unused ones fill up to three.

    Every step takes from a count. It ends: where all are 1, three exponents and the end of the stream have two bits.
    """
    spread = counts.copy()
    unused = np.flatnonzero(spread[:FIRST_POINTER] == 0)
    spread[unused[: max(0, 3 - np.count_nonzero(spread))]] = 1
    while True:
        short = [c.symbol for c in huffman(spread) if c.bits == 1 and c.symbol != EOF]
        if not short:
            return spread
        count = int(spread[short[0]])
        spread[short[0]] = max(1, min(count - 1, (int(spread.sum()) - count + 1) // 2))


def _prefixes(codes: Sequence[Code]) -> list[tuple[int, int]]:
    """(bits, value) of every table's prefix: the root, then by length, equal lengths in book order."""
    found = {(0, 0): None}
    for code in codes:
        if code.symbol != EOF:
            level = (code.bits - 1) // 8
            found[8 * level, code.value >> (code.bits - 8 * level)] = None
    return sorted(found, key=lambda prefix: prefix[0])


def _luts(codes: Sequence[Code], fill: int | None = None) -> np.ndarray:
    """Decode tables and the row of lengths. Unused slots repeat the slot before, across rows, or hold `fill`."""
    prefixes = _prefixes(codes)
    luts = np.zeros((len(prefixes) + 1, 256), np.uint8)
    last = _first_symbol(codes)  # only where the root has no key 0, on which the package stops
    for row, (bits, value) in enumerate(prefixes):
        slots = _row(codes, prefixes, bits, value)
        for slot in range(256):
            last = slots.get(slot, last if fill is None else fill)
            luts[row, slot] = last
    for code in codes:
        if code.symbol != EOF:
            luts[-1, code.symbol] = code.bits
    return luts


def _row(codes: Sequence[Code], prefixes: list[tuple[int, int]], bits: int, value: int) -> dict[int, int]:
    """The slots of one table: exponents whose code ends in this byte, pointers to child tables; none for EOF's code."""
    slots: dict[int, int] = {}
    for code in codes:
        rest = code.bits - bits
        if code.symbol == EOF or rest <= 0 or code.value >> rest != value:
            continue
        tail = code.value & ((1 << rest) - 1)
        if rest <= 8:
            first = tail << (8 - rest)
            slots |= dict.fromkeys(range(first, first + (1 << (8 - rest))), code.symbol)
        else:
            slots[tail >> (rest - 8)] = 256 - prefixes.index((bits + 8, code.value >> (rest - 8)))
    return slots


def _first_symbol(codes: Sequence[Code]) -> int:
    return next(code.symbol for code in codes if code.symbol != EOF)


def stalls(luts: np.ndarray, window: int, gap: int) -> bool:
    """Whether the official kernel would loop for ever on this window: 96 bits, its 64 and 32 of the next.

    It decodes until it has used 64 bits, padding and the zeros after the stream included, so a slot under the
    end-of-stream code can lead to an exponent whose length is 0.
    """
    used = gap
    while used < WINDOW_BITS:
        bits, row = window >> (WINDOW_BITS - used), 0  # the next 32 bits are the low ones
        for shift in (24, 16, 8, 0):
            symbol = int(luts[row, (bits >> shift) & 255])
            if symbol < FIRST_POINTER:
                break
            row = 256 - symbol
        if luts[-1, symbol] == 0:
            return True
        used += int(luts[-1, symbol])
    return False
