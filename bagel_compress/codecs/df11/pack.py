"""Numba kernels of the DF11 encoder: histogram, sign and mantissa bytes, code stream, verification.

Eight weights at a time become one piece of at most 56 bits, by a table of exponent pairs; longer pieces, which are
rare, are appended weight by weight. Where codes start (gaps, block positions) is found by the decoder that verifies the
stream, which passes their ends anyway. The innermost functions get addresses and numbers and are inlined, because numba
counts references to every array that it passes.
All kernels release the interpreter lock; batches of one unit are packed by any number of threads.
"""

# mypy: disable-error-code="arg-type,assignment,call-arg,call-overload,index,operator,return-value,var-annotated"
# (numba types these functions itself, and more strictly)

from __future__ import annotations

import numpy as np
from numba import njit

from bagel_compress.codecs.df11.unpack import verify
from bagel_compress.codecs.kernels.addresses import address_of, byteswap, load8, load16, load64, store64

CHUNK = 1 << 15  # weights: two of them and all that is made of them stay in the second-level cache
SLACK = 16  # bytes that stores of eight reach beyond the last code
PIECE_BITS = 56  # what a piece may have: up to 7 more are taken in the word it is added to
_TOO_LONG = 255
CODED, CHANGED, DIFFERENT = 0, 1, 2
_U = np.uint64
_CODE = _U(0xFFFFFFFF)
_HALF = _U(32)
_BYTE = _U(0xFF)
_EVEN = _U(0x00FF00FF00FF00FF)
_PAIR = _U(0xFFFF)

_compiled = njit(nogil=True, cache=True)
_inlined = njit(nogil=True, inline="always")


def pair_table(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Joined codes of two exponents, indexed first | second << 8: uint64, code | length << 32.

    Pairs of over 32 bits have a length that no piece may have. Entries of unused exponents are never read.
    """
    first_bits, second_bits = np.tile(lengths.astype(np.uint64), 256), np.repeat(lengths.astype(np.uint64), 256)
    first, second = np.tile(values.astype(np.uint64), 256), np.repeat(values.astype(np.uint64), 256)
    bits = first_bits + second_bits
    return ((first << second_bits) | second) & _CODE | (np.where(bits > _HALF, _U(_TOO_LONG), bits) << _HALF)


@_compiled
def count(words: np.ndarray, tables: np.ndarray, out: np.ndarray) -> None:
    """Histogram of the exponents of uint16 `words` into int64 `out` [256]; `tables` is uint32 [2, 65536] scratch.

    Pairs are counted, of weights that are four apart: half as many steps. Two tables, so that equal pairs in a row do
    not wait for each other.
    """
    tables[:] = 0
    out[:] = 0
    address = address_of(words)
    whole = words.size // 8 * 8
    for i in range(0, whole, 8):
        a, b = load64(address + 2 * i), load64(address + 2 * i + 8)
        pairs = ((a >> _U(7)) & _EVEN) | ((b << _U(1)) & ~_EVEN)
        tables[0, pairs & _PAIR] += np.uint32(1)
        tables[1, (pairs >> _U(16)) & _PAIR] += np.uint32(1)
        tables[0, (pairs >> _U(32)) & _PAIR] += np.uint32(1)
        tables[1, pairs >> _U(48)] += np.uint32(1)
    for i in range(whole, words.size):
        out[(words[i] >> np.uint16(7)) & np.uint16(255)] += 1
    for first in range(256):
        row = np.int64(0)
        for second in range(256):
            found = np.int64(tables[0, 256 * first + second]) + np.int64(tables[1, 256 * first + second])
            out[second] += found
            row += found
        out[first] += row


@_compiled
def code(
    words: np.ndarray,
    place: tuple[int, int, int, int],
    values: np.ndarray,
    lengths: np.ndarray,
    pairs: np.ndarray,
    lookup: np.ndarray,
    luts: np.ndarray,
    rest: np.ndarray,
    stream: np.ndarray,
    gaps: np.ndarray,
    positions: np.ndarray,
    exponents: np.ndarray,
) -> int:
    """Packs uint16 `words`, and decodes and compares them two chunks at a time, which are still in the cache: status.

    `place` is the first weight's index in the unit, the unit's weights, and the bits of its stream at which these words
    begin and end. `rest` gets sign and mantissa, one byte each; `stream` the codes, from the byte of their first bit
    on, whose earlier bits become 0. `gaps` and `positions`, of the whole unit, get what the decoder found.
    `exponents` is uint8 [2, CHUNK + SCRATCH_SLACK] scratch.
    """
    first, weights, bit, stop = place
    base = address_of(stream) - (bit >> 3)
    tables = (address_of(values), address_of(lengths), address_of(pairs))
    starts, scratch = np.empty(3, np.int64), np.empty(CHUNK, np.uint16)
    stream[0] = 0
    starts[2] = bit
    for begin in range(0, words.size, 2 * CHUNK):
        part, plane = words[begin : begin + 2 * CHUNK], rest[begin : begin + 2 * CHUNK]
        chunks = (part.size + CHUNK - 1) // CHUNK
        starts[0] = starts[2]
        for k in range(chunks):
            chunk = part[k * CHUNK : (k + 1) * CHUNK]
            _split(chunk, exponents[0], plane[k * CHUNK : (k + 1) * CHUNK])
            target = base + (starts[k] >> 3)
            starts[k + 1] = _pack(address_of(exponents[0]), chunk.size, starts[k], *tables, target)
        starts[2] = starts[chunks]
        if starts[2] > stop:
            return CHANGED
        if not verify(
            part, CHUNK, base, first + begin, weights, starts[: chunks + 1], plane, lookup, luts, gaps, positions,
            exponents, scratch,
        ):  # fmt: skip
            return DIFFERENT
    return CODED if starts[2] == stop else CHANGED


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
def _pack(source, size, bit, values, lengths, pairs, target):  # type: ignore[no-untyped-def]
    """Codes of `size` exponents at `source`, from bit `bit` on: the bit after. All but numbers are addresses.

    The first `bit % 8` bits of `target` hold the end of the code before, the others are 0.
    """
    held, filled, begin, used = load8(target) << _U(56), _U(bit & 7), target, _U(bit & 7)
    whole = size // 8 * 8
    for i in range(0, whole, 8):
        a, b = _entry(pairs, load16(source + i)), _entry(pairs, load16(source + i + 2))
        c, d = _entry(pairs, load16(source + i + 4)), _entry(pairs, load16(source + i + 6))
        bits_b, bits_d = b >> _HALF, d >> _HALF
        last_bits = (c >> _HALF) + bits_d
        bits = (a >> _HALF) + bits_b + last_bits
        if bits > _U(PIECE_BITS):
            held, filled, target = _pack_few(source, i, i + 8, values, lengths, held, filled, target)
            continue
        piece = ((((a & _CODE) << bits_b) | (b & _CODE)) << last_bits) | ((c & _CODE) << bits_d) | (d & _CODE)
        held, filled, target = _append(piece, bits, held, filled, target)
    held, filled, target = _pack_few(source, whole, size, values, lengths, held, filled, target)
    return bit + 8 * (target - begin) + np.int64(filled) - np.int64(used)


@_inlined
def _entry(table, index):  # type: ignore[no-untyped-def]
    return load64(table + np.int64(index << _U(3)))


@_compiled
def _pack_few(source, begin, stop, values, lengths, held, filled, target):  # type: ignore[no-untyped-def]
    for j in range(begin, stop):
        exponent = np.int64(load8(source + j))
        bits = load8(lengths + exponent)
        held, filled, target = _append(load64(values + 8 * exponent), bits, held, filled, target)
    return held, filled, target


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
    """The block positions of a batch that starts at `bit`, for a unit whose blocks may hold too many weights."""
    at = bit
    for i in range(words.size):
        end = at + lengths[(words[i] >> np.uint16(7)) & np.uint16(255)]
        if (end >> 15) != (at >> 15) and end >> 15 < positions.size:
            positions[end >> 15] = first + i + 1
        at = end
