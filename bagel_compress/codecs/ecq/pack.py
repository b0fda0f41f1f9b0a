"""Numba kernels of the ecq encoder: histogram, codes by table, coder tables, and runs of symbols to bits.

A run is coded from its last symbol to its first, because the decoder undoes the coder's steps. That is one chain of
steps that wait for each other, so eight runs are coded together, and a step only leaves a piece of 16 bits: how many
bits the symbol takes, and the bits. Pieces are then joined from the first to the last: four at a time in vector
registers, and these, of at most 48 bits, to bytes. Kernels release the interpreter lock and hold no state.
"""

# mypy: disable-error-code="arg-type,assignment,call-arg,call-overload,index,operator,return-value,var-annotated"
# (numba types these functions itself, and more strictly)

from __future__ import annotations

import numpy as np
from numba import njit

from bagel_compress.codecs.ecq.layout import CENTRE, ESCAPE, HEADER_BYTES, RUN, STATE_BITS, STATES
from bagel_compress.codecs.kernels.addresses import (
    address_of,
    load8,
    load16,
    load64,
    ones,
    store16,
    store64,
    trailing_zeros,
)

TOGETHER = 8  # runs
PIECES = RUN + 32  # of a run, with a gap so that those of several runs do not meet in one set of the cache
SPREAD = (STATES >> 1) + (STATES >> 3) + 3  # odd, so that it visits every state (as in FSE, Y. Collet)
_U = np.uint64
_ONE = _U(1)
_PIECE = _U(0xFFFF)
_STATE_BITS = _U(STATE_BITS)
_OFFSETS = 8 * (ESCAPE + 1)  # bytes from the first row of the coder's table to the second
_BITS0 = _U(0x0101010101010101)
_LOW7 = _U(0x7F7F7F7F7F7F7F7F)
_HIGH = _U(0x8080808080808080)
_GATHER = _U(0x0102040810204080)  # multiplies bit 0 of eight bytes into the top byte

_compiled = njit(nogil=True, cache=True)
_inlined = njit(nogil=True, inline="always")


@_compiled
def count(words: np.ndarray, counts: np.ndarray) -> None:
    """Adds uint16 `words` to their histogram, uint32 [65536]."""
    for i in range(words.size):
        counts[words[i]] += np.uint32(1)


@_compiled
def count_codes(codes: np.ndarray, counts: np.ndarray) -> None:
    """Adds whole-numbered fp32 `codes` to their histogram, int64 [2 m + 1], from -m to m; others to those ends."""
    most = np.float32(counts.size // 2)
    for i in range(codes.size):
        counts[np.int64(min(max(codes[i], -most), most) + most)] += 1


@_compiled
def split_codes(codes: np.ndarray, low_bits: int, known: np.ndarray, symbols: np.ndarray, lows: np.ndarray) -> None:
    """Whole-numbered fp32 `codes` to uint8 `symbols` and `lows`; ESCAPE where `known`, bool [256], has no symbol."""
    for i in range(codes.size):
        code = np.int32(codes[i])
        high = (code >> np.int32(low_bits)) + np.int32(CENTRE)
        inside = high >= 0 and high < ESCAPE and known[high]
        symbols[i] = np.uint8(high) if inside else np.uint8(ESCAPE)
        lows[i] = np.uint8(code & ((1 << low_bits) - 1)) if inside else np.uint8(0)


@_compiled
def normalise(counts: np.ndarray, frequencies: np.ndarray) -> None:
    """Frequencies of sum 4096, at least 1 where a count is not 0, of least cost: int64 [256] both."""
    total = counts.sum()
    left = STATES
    for s in range(counts.size):
        frequencies[s] = max(1, int(counts[s] * STATES / total)) if counts[s] else 0
        left -= frequencies[s]
    while left != 0:
        best, place = -1.0e300, 0
        for s in range(counts.size):
            f = frequencies[s]
            if counts[s] == 0 or (left < 0 and f == 1):
                continue
            gain = counts[s] * np.log2((f + 1) / f) if left > 0 else -counts[s] * np.log2(f / (f - 1))
            if gain > best:
                best, place = gain, s
        frequencies[place] += 1 if left > 0 else -1
        left += -1 if left > 0 else 1


@_compiled
def states_of(frequencies: np.ndarray) -> np.ndarray:
    """uint8 [4096]: the symbol of every state of the decoder."""
    symbols, place = np.empty(STATES, np.uint8), 0
    for s in range(frequencies.size):
        for _ in range(frequencies[s]):
            symbols[place] = s
            place = (place + SPREAD) & (STATES - 1)
    return symbols


@_compiled
def coder(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tables of the encoder: int64 [2, 256] by symbol and uint16 [4096] next states (4096 to 8191).

    A symbol's first number, added to the state, gives how many bits it takes from bit 12 on, and leaves these, the
    state's lowest, in place. Its second, added to the state without those bits, is the index of the next state. Symbols
    without a frequency lead to a state of another one, so that no symbol leaves the tables.
    """
    symbols, seen = states_of(frequencies), frequencies.copy()
    first, following = np.zeros(frequencies.size, np.int64), np.empty(STATES, np.uint16)
    entries = np.zeros((2, frequencies.size), np.int64)
    start = 0
    for s in range(frequencies.size):
        f, first[s] = frequencies[s], start
        if f:
            most = STATE_BITS - (_log2(f - 1) if f > 1 else 0)
            entries[0, s], entries[1, s] = (most << STATE_BITS) - (f << most), start - f
        start += f
    for state in range(STATES):
        s = symbols[state]
        following[first[s] + seen[s] - frequencies[s]] = STATES + state
        seen[s] += 1
    return entries, following


@_inlined
def _log2(x):  # type: ignore[no-untyped-def]
    bits = -1
    while x:
        x >>= 1
        bits += 1
    return bits


@_compiled
def look_up(words: np.ndarray, table: np.ndarray, symbols: np.ndarray) -> None:
    """uint8 `table` [65536] of uint16 `words`, into uint8 `symbols`."""
    for i in range(words.size):
        symbols[i] = table[words[i]]


@_inlined
def escape_marks(eight):  # type: ignore[no-untyped-def]
    """The top bit of every byte of eight symbols that is ESCAPE."""
    inverse = ~eight
    return ~(((inverse & _LOW7) + _LOW7) | inverse) & _HIGH


@_compiled
def count_escapes(symbols: int, size: int) -> int:
    """ESCAPEs among the symbols at an address; up to seven more are read."""
    found, whole = 0, size & ~7
    for i in range(symbols, symbols + whole, 8):
        found += np.int64(ones(escape_marks(load64(i))))
    if size & 7:
        found += np.int64(ones(escape_marks(load64(symbols + whole)) & ((_ONE << _U(8 * (size & 7))) - _ONE)))
    return found


@_inlined
def _step(symbol, entries, following, state, piece):  # type: ignore[no-untyped-def]
    """One step of the coder: the next state. What the symbol takes goes to the address `piece`."""
    entry = entries + np.int64(symbol << _U(3))
    bits = state + load64(entry)
    store16(piece, bits)
    index = (state >> (bits >> _STATE_BITS)) + load64(entry + _OFFSETS)
    return load16(following + 2 * np.int64(index))


@_compiled
def _one(symbols, size, entries, following, pieces):  # type: ignore[no-untyped-def]
    """Pieces of the `size` symbols at an address, and empty ones up to a multiple of four; the last state."""
    state = _U(STATES)
    for i in range(size, (size + 3) & ~3):
        store16(pieces + 2 * i, _U(0))
    for i in range(size - 1, -1, -1):
        state = _step(load8(symbols + i), entries, following, state, pieces + 2 * i)
    return state


@_compiled
def _eight(symbols, entries, following, pieces):  # type: ignore[no-untyped-def]
    """The same for eight whole runs that follow each other, each to PIECES pieces."""
    state = state2 = state3 = state4 = state5 = state6 = state7 = state8 = _U(STATES)
    at = pieces + 2 * RUN
    for i in range(symbols + RUN - 1, symbols - 1, -1):
        at -= 2
        state = _step(load8(i), entries, following, state, at)
        state2 = _step(load8(i + RUN), entries, following, state2, at + 2 * PIECES)
        state3 = _step(load8(i + 2 * RUN), entries, following, state3, at + 4 * PIECES)
        state4 = _step(load8(i + 3 * RUN), entries, following, state4, at + 6 * PIECES)
        state5 = _step(load8(i + 4 * RUN), entries, following, state5, at + 8 * PIECES)
        state6 = _step(load8(i + 5 * RUN), entries, following, state6, at + 10 * PIECES)
        state7 = _step(load8(i + 6 * RUN), entries, following, state7, at + 12 * PIECES)
        state8 = _step(load8(i + 7 * RUN), entries, following, state8, at + 14 * PIECES)
    return state, state2, state3, state4, state5, state6, state7, state8


@_compiled
def _join_four(pieces: np.ndarray, joined: np.ndarray) -> int:
    """Bits of four pieces, uint64 `pieces` [n], to uint64 `joined` [0], how many to [1]; the bits of all."""
    total = _U(0)
    for i in range(pieces.size):
        four = pieces[i]
        a, b, c, d = four & _PIECE, (four >> _U(16)) & _PIECE, (four >> _U(32)) & _PIECE, four >> _U(48)
        bits_a, bits_b, bits_c, bits_d = a >> _STATE_BITS, b >> _STATE_BITS, c >> _STATE_BITS, d >> _STATE_BITS
        first = (a & ((_ONE << bits_a) - _ONE)) | ((b & ((_ONE << bits_b) - _ONE)) << bits_a)
        last = (c & ((_ONE << bits_c) - _ONE)) | ((d & ((_ONE << bits_d) - _ONE)) << bits_c)
        bits = bits_a + bits_b
        joined[0, i] = first | (last << bits)
        bits += bits_c + bits_d
        joined[1, i] = bits
        total += bits
    return total


@_compiled
def _write(joined: np.ndarray, size: int, filled: int, target: int) -> int:
    """Writes `size` joined bits, behind `filled` (0 to 7) bits of 0, to an address: the address after.

    Up to seven bytes more are written.
    """
    held = _U(0)
    for i in range(size):
        held |= joined[0, i] << filled
        store64(target, held)
        filled += joined[1, i]
        held >>= filled & _U(0x38)
        target += np.int64(filled >> _U(3))
        filled &= _U(7)
    return target


@_compiled
def pack(
    symbols: np.ndarray,
    lows: np.ndarray,
    escaped: np.ndarray,
    low_bits: int,
    escaping: bool,
    entries: np.ndarray,
    following: np.ndarray,
    pieces: np.ndarray,
    joined: np.ndarray,
    out: np.ndarray,
    sizes: np.ndarray,
) -> int:
    """Codes uint8 `symbols`, runs of RUN and perhaps a shorter last one, into uint8 `out`; returns its bytes.

    `lows` are uint8 of `low_bits` bits; `escaped`, uint16 of the symbols' size, has the words of ESCAPEs. `sizes`,
    int64 [runs], gets the bytes of each run; uint64 `pieces` [TOGETHER, PIECES / 4] and `joined` [2, RUN / 4] are
    scratch. `out` has room for the runs and eight bytes more, and eight more may be read behind the symbols and lows.
    """
    book, states, address, target = address_of(entries), address_of(following), address_of(symbols), address_of(out)
    at, first, whole, ends = 0, 0, symbols.size // RUN, np.empty(TOGETHER, np.uint64)
    while first < sizes.size:
        together = TOGETHER if first + TOGETHER <= whole else 1
        if together == TOGETHER:
            ends[0], ends[1], ends[2], ends[3], ends[4], ends[5], ends[6], ends[7] = _eight(
                address + first * RUN, book, states, address_of(pieces)
            )
        else:
            size = min(RUN, symbols.size - first * RUN)
            ends[0] = _one(address + first * RUN, size, book, states, address_of(pieces))
        for k in range(together):
            start, before = (first + k) * RUN, at
            size = min(RUN, symbols.size - start)
            fours = (size + 3) >> 2
            padding = -_join_four(pieces[k, :fours], joined) & _U(7)
            store16(target + at, (ends[k] - _U(STATES)) | (padding << _STATE_BITS))
            at += HEADER_BYTES
            for bit in range(low_bits):
                at = _pack_plane(lows[start : start + size], bit, out, at)
            at = _write(joined, fours, padding, target + at) - target
            if escaping:
                at = _pack_escapes(address + start, size, address_of(escaped) + 2 * start, target, at)
            sizes[first + k] = at - before
        first += together
    return at


@_compiled
def _pack_escapes(symbols, size, words, out, at):  # type: ignore[no-untyped-def]
    """The words of the ESCAPEs among the symbols at an address, last one first, to `out` from byte `at` on.

    Returns the byte after.
    """
    end = at + 2 * count_escapes(symbols, size)
    place = end
    for i in range(0, size, 8):
        marks = escape_marks(load64(symbols + i))
        if size - i < 8:
            marks &= (_ONE << _U(8 * (size - i))) - _ONE
        while marks:
            place -= 2
            store16(out + place, load16(words + 2 * (i + np.int64(trailing_zeros(marks) >> _U(3)))))
            marks &= marks - _ONE
    return end


@_compiled
def _pack_plane(lows, bit, out, at):  # type: ignore[no-untyped-def]
    address, whole = address_of(lows), lows.size >> 3
    for i in range(whole):
        out[at + i] = ((((load64(address + 8 * i) >> _U(bit)) & _BITS0) * _GATHER) >> _U(56)) & _U(255)
    at += whole
    if lows.size & 7:
        byte = 0
        for i in range(8 * whole, lows.size):
            byte |= ((lows[i] >> bit) & 1) << (i & 7)
        out[at] = byte
        at += 1
    return at
