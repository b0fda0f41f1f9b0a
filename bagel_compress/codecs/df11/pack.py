"""Numba kernels of the DF11 encoder: histogram, sign and mantissa bytes, code stream with gaps and block positions.

Eight weights at a time become one piece of at most 56 bits, by a table of exponent pairs that holds, beside the joined
code, one bit where each code ends: where a piece crosses a 64-bit window, they tell the next code's start. Rare long
pieces are appended weight by weight. The innermost functions get addresses and numbers and are inlined, because numba
counts references to every array that it passes.
All kernels release the interpreter lock; batches of one unit are packed by any number of threads.
"""

# mypy: disable-error-code="arg-type,assignment,call-arg,call-overload,index,operator,return-value,var-annotated"
# (numba types these functions itself, and more strictly)

from __future__ import annotations

import numpy as np
from numba import njit

from bagel_compress.codecs.df11.words import (
    address_of,
    byteswap,
    leading_zeros,
    load8,
    load16,
    load64,
    ones,
    store8,
    store64,
)

CHUNK = 1 << 16  # weights: 128 KB of bf16, which stays in the second-level cache
SLACK = 16  # bytes that stores of eight reach beyond the last code
_U = np.uint64
_CODE = _U(0xFFFFFFFF)
_HALF = _U(32)
_BYTE = _U(0xFF)

_compiled = njit(nogil=True, cache=True)
_inlined = njit(nogil=True, inline="always")


def pair_tables(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joined codes of two exponents, indexed first | second << 8: uint64 (code | ends << 32) and uint8 lengths.

    Entries of unused exponents, and of pairs over 32 bits, are never read or never used.
    """
    first_bits, second_bits = np.tile(lengths.astype(np.uint64), 256), np.repeat(lengths.astype(np.uint64), 256)
    first, second = np.tile(values.astype(np.uint64), 256), np.repeat(values.astype(np.uint64), 256)
    ends = _U(1) | (_U(1) << second_bits)
    return ((first << second_bits) | second) & _CODE | (ends << _HALF), (first_bits + second_bits).astype(np.uint8)


@_compiled
def count_chunks(words: np.ndarray, tables: np.ndarray, out: np.ndarray) -> None:
    """Histogram of the exponents of each chunk of uint16 `words` into uint32 `out` [chunks, 256].

    `tables` is uint32 [8, 256] scratch.
    """
    for k in range((words.size + CHUNK - 1) // CHUNK):
        _count(words[k * CHUNK : (k + 1) * CHUNK], tables, out[k])


@_compiled
def _count(words: np.ndarray, tables: np.ndarray, out: np.ndarray) -> None:
    """Eight tables, so that equal exponents in a row do not wait for each other."""
    tables[:] = 0
    address = address_of(words)
    whole = words.size // 8 * 8
    for i in range(0, whole, 8):
        a = load64(address + 2 * i)
        b = load64(address + 2 * i + 8)
        for lane in range(4):
            shift = _U(16 * lane + 7)
            tables[lane, (a >> shift) & _BYTE] += np.uint32(1)
            tables[lane + 4, (b >> shift) & _BYTE] += np.uint32(1)
    for i in range(whole, words.size):
        tables[0, (words[i] >> np.uint16(7)) & np.uint16(255)] += np.uint32(1)
    for e in range(256):
        total = np.uint32(0)
        for t in range(8):
            total += tables[t, e]
        out[e] = total


@_compiled
def pack_chunks(
    words: np.ndarray,
    first: int,
    bits: np.ndarray,
    values: np.ndarray,
    lengths: np.ndarray,
    pair_values: np.ndarray,
    pair_lengths: np.ndarray,
    rest: np.ndarray,
    stream: np.ndarray,
    gaps: np.ndarray,
    positions: np.ndarray,
) -> bool:
    """Both planes of uint16 `words`, which are weights `first`... of the unit, chunk by chunk.

    `rest` gets sign and mantissa, one byte each. `stream` gets the codes; chunk k is bits [bits[k], bits[k + 1]) of the
    unit's stream, and the first byte is that of bit `bits` [0], whose earlier bits are 0. Where a code ends in another
    64-bit window than it began, `gaps` [window] and, at a block's first window, `positions` [block] get what follows.
    Returns whether every chunk had the bits it was planned with; if not, the source has changed since the first pass.
    """
    exponents, spare = np.empty(CHUNK, np.uint8), np.empty(1, np.uint8)
    tables = (address_of(values), address_of(lengths), address_of(pair_values), address_of(pair_lengths))
    stream[0] = 0
    for k in range(bits.size - 1):
        begin = k * CHUNK
        chunk = words[begin : begin + CHUNK]
        _split(chunk, exponents, rest[begin : begin + CHUNK])
        if not _pack(
            address_of(exponents), chunk.size, first + begin, bits[k], bits[k + 1], *tables,
            address_of(stream) + (bits[k] >> 3) - (bits[0] >> 3),
            address_of(gaps), address_of(positions), address_of(spare),
        ):  # fmt: skip
            return False
    return True


@_compiled
def _split(words: np.ndarray, exponents: np.ndarray, rest: np.ndarray) -> None:
    for i in range(words.size):
        exponents[i] = np.uint8(words[i] >> np.uint16(7))
        rest[i] = np.uint8(((words[i] >> np.uint16(8)) & np.uint16(0x80)) | (words[i] & np.uint16(0x7F)))


@_inlined
def _append(piece, bits, held, filled, target):  # type: ignore[no-untyped-def]
    """Adds `bits` (1 to 56) of `piece` to the left-aligned `held` of which `filled` (0 to 7) bits are taken."""
    held |= piece << (_U(64) - filled - bits)
    filled += bits
    store64(target, byteswap(held))
    return held << (filled & _U(0x38)), filled & _U(7), target + np.int64(filled >> _U(3))


@_compiled
def _pack(  # type: ignore[no-untyped-def]
    source, size, first, bit, stop, values, lengths, pair_values, pair_lengths, target, gaps, positions, spare
):
    """Codes of `size` exponents at `source`; whether they had `stop - bit` bits. All but numbers are addresses.

    The first `bit % 8` bits of `target` hold the end of the code before, the others are 0.
    """
    held, filled, at, limit = load8(target) << _U(56), _U(bit & 7), _U(bit), _U(stop)
    whole = size // 8 * 8
    for i in range(0, whole, 8):
        p0, p1, p2, p3 = load16(source + i), load16(source + i + 2), load16(source + i + 4), load16(source + i + 6)
        bits1, bits3 = load8(pair_lengths + np.int64(p1)), load8(pair_lengths + np.int64(p3))
        bits_a, bits_b = load8(pair_lengths + np.int64(p0)) + bits1, load8(pair_lengths + np.int64(p2)) + bits3
        bits = bits_a + bits_b
        end = at + bits
        if (bits_a > _HALF) | (bits_b > _HALF) | (bits > _U(56)) | (end > limit):
            held, filled, target, at = _pack_few(
                source, i, i + 8, first, limit, values, lengths, held, filled, target, at, gaps, positions
            )
            continue
        joined_a = (_entry(pair_values, p0) << bits1) | _entry(pair_values, p1)
        joined_b = (_entry(pair_values, p2) << bits3) | _entry(pair_values, p3)
        held, filled, target = _append(((joined_a & _CODE) << bits_b) | (joined_b & _CODE), bits, held, filled, target)
        over, window, crossed = end & _U(63), end >> _U(6), (end ^ at) >> _U(6) != _U(0)
        ends = (((joined_a >> _HALF) << bits_b) | (joined_b >> _HALF)) & ((_U(2) << over) - _U(1))
        # No branch: whether a piece crosses a window is as good as random. `spare` takes what is no gap.
        place = gaps + np.int64(window) if crossed else spare
        store8(place, over - (_U(63) - leading_zeros(ends)))
        if window & _U(511) == _U(0) and crossed:
            store64(positions + 8 * np.int64(window >> _U(9)), _U(first + i + 9 - np.int64(ones(ends))))
        at = end
    held, filled, target, at = _pack_few(
        source, whole, size, first, limit, values, lengths, held, filled, target, at, gaps, positions
    )
    return at == limit


@_inlined
def _entry(table, index):  # type: ignore[no-untyped-def]
    return load64(table + np.int64(index << _U(3)))


@_compiled
def _pack_few(  # type: ignore[no-untyped-def]
    source, begin, stop, first, limit, values, lengths, held, filled, target, at, gaps, positions
):
    for j in range(begin, stop):
        exponent = np.int64(load8(source + j))
        bits = load8(lengths + exponent)
        held, filled, target = _append(load64(values + 8 * exponent), bits, held, filled, target)
        end = at + bits
        window = end >> _U(6)
        if window != at >> _U(6) and end <= limit:
            store8(gaps + np.int64(window), end & _U(63))
            if window & _U(511) == _U(0):
                store64(positions + 8 * np.int64(window >> _U(9)), _U(first + j + 1))
        at = end
    return held, filled, target, at


@_compiled
def pack_gaps(gaps: np.ndarray, out: np.ndarray) -> None:
    """5 bits each, first in the highest bits: uint8 `gaps` [8 n] into uint8 `out` [5 n]."""
    for k in range(out.size // 5):
        word = np.uint64(0)
        for j in range(8):
            word = (word << _U(5)) | _U(gaps[8 * k + j])
        for j in range(5):
            out[5 * k + j] = np.uint8((word >> _U(32 - 8 * j)) & _BYTE)


@_compiled
def mark_blocks(words: np.ndarray, first: int, bit: int, lengths: np.ndarray, positions: np.ndarray) -> None:
    """Only the block positions of `pack`, for a unit whose blocks may hold too many weights."""
    at = bit
    for i in range(words.size):
        end = at + lengths[(words[i] >> np.uint16(7)) & np.uint16(255)]
        if (end >> 15) != (at >> 15) and end >> 15 < positions.size:
            positions[end >> 15] = first + i + 1
        at = end
