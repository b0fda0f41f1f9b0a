"""Numba kernels of the ecq encoder: histogram, codes by table, coder tables, and runs of symbols to bits.

A run is coded from its last symbol to its first, because the decoder undoes the coder's steps; bits are written
backwards into scratch memory and the finished run is copied to its place. Four runs at a time: a step of the coder
waits for the one before it. Kernels release the interpreter lock and hold no state.
"""

# mypy: disable-error-code="arg-type,assignment,call-arg,call-overload,index,operator,return-value,var-annotated"
# (numba types these functions itself, and more strictly)

from __future__ import annotations

import numpy as np
from numba import njit

from bagel_compress.codecs.ecq.layout import CENTRE, ESCAPE, RUN, STATE_BITS, STATES
from bagel_compress.codecs.kernels.addresses import (
    address_of,
    load8,
    load16,
    load64,
    ones,
    store8,
    store16,
    store64,
    trailing_zeros,
)

SCRATCH = RUN * STATE_BITS // 8 + 32  # bytes that one run's symbols may take, with room for stores of eight
SPREAD = (STATES >> 1) + (STATES >> 3) + 3  # odd, so that it visits every state (as in FSE, Y. Collet)
_U = np.uint64
_ONE = _U(1)
_LOW32 = _U(0xFFFFFFFF)
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
    """Tables of the encoder: int64 [256] per symbol and uint16 [8192] next states (4096 to 8191).

    A symbol's entry has, in its low half, what gives the number of bits in bit 16 and up when the state is added; in
    its high half, what gives the index of the next state when the state without those bits is added. Symbols without a
    frequency lead into the second half of the states, so that no symbol leaves the tables.
    """
    symbols, seen = states_of(frequencies), frequencies.copy()
    first, following = np.zeros(frequencies.size, np.int64), np.full(2 * STATES, STATES, np.uint16)
    entries = np.zeros(frequencies.size, np.int64)
    start = 0
    for s in range(frequencies.size):
        f, first[s] = frequencies[s], start
        if f:
            most = STATE_BITS - (_log2(f - 1) if f > 1 else 0)
            entries[s] = ((start - f) << 32) | ((most << 16) - (f << most))
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
def _push(symbol, entries, following, state, held, filled):  # type: ignore[no-untyped-def]
    """One step of the coder: the state's low bits go to `held`, below those that are there."""
    entry = load64(entries + np.int64(symbol << _U(3)))
    bits = (state + (entry & _LOW32)) >> _U(16)
    held = (held << bits) | (state & ((_ONE << bits) - _ONE))
    index = np.int64(state >> bits) + (np.int64(entry) >> np.int64(32))
    return load16(following + 2 * index), held, filled + bits


@_inlined
def _flush(held, filled, target):  # type: ignore[no-untyped-def]
    """Writes the oldest whole bytes of `held`, at most 7, in front of `target`."""
    store64(target - 8, (held << _ONE) << (_U(63) - filled))
    return filled & _U(7), target - np.int64(filled >> _U(3))


@_inlined
def _close(state, held, filled, target):  # type: ignore[no-untyped-def]
    """The bits left, padded to a byte, and the run's header in front of them: the address of the run."""
    padding = (_U(8) - filled) & _U(7)
    if filled:
        target -= 1
        store8(target, held << padding)
    store16(target - 2, (state - _U(STATES)) | (padding << _U(STATE_BITS)))
    return target - 2


@_compiled
def _one(symbols, size, entries, following, target):  # type: ignore[no-untyped-def]
    """Codes the `size` symbols at an address into the bytes in front of `target`; the address of the first byte."""
    state, held, filled = _U(STATES), _U(0), _U(0)
    for i in range(size - 1, -1, -1):
        state, held, filled = _push(load8(symbols + i), entries, following, state, held, filled)
        filled, target = _flush(held, filled, target)
    return _close(state, held, filled, target)


@_compiled
def _four(symbols, entries, following, scratch):  # type: ignore[no-untyped-def]
    """The same for four whole runs that follow each other, each into its SCRATCH bytes at an address."""
    state, held, filled, target = _U(STATES), _U(0), _U(0), scratch + SCRATCH - 8
    state2, held2, filled2, target2 = _U(STATES), _U(0), _U(0), scratch + 2 * SCRATCH - 8
    state3, held3, filled3, target3 = _U(STATES), _U(0), _U(0), scratch + 3 * SCRATCH - 8
    state4, held4, filled4, target4 = _U(STATES), _U(0), _U(0), scratch + 4 * SCRATCH - 8
    for i in range(symbols + RUN - 4, symbols - 1, -4):
        for k in range(4):
            state, held, filled = _push(load8(i + 3 - k), entries, following, state, held, filled)
            state2, held2, filled2 = _push(load8(i + RUN + 3 - k), entries, following, state2, held2, filled2)
            state3, held3, filled3 = _push(load8(i + 2 * RUN + 3 - k), entries, following, state3, held3, filled3)
            state4, held4, filled4 = _push(load8(i + 3 * RUN + 3 - k), entries, following, state4, held4, filled4)
        filled, target = _flush(held, filled, target)
        filled2, target2 = _flush(held2, filled2, target2)
        filled3, target3 = _flush(held3, filled3, target3)
        filled4, target4 = _flush(held4, filled4, target4)
    return (
        _close(state, held, filled, target),
        _close(state2, held2, filled2, target2),
        _close(state3, held3, filled3, target3),
        _close(state4, held4, filled4, target4),
    )


@_compiled
def pack(
    symbols: np.ndarray,
    lows: np.ndarray,
    escaped: np.ndarray,
    low_bits: int,
    escaping: bool,
    entries: np.ndarray,
    following: np.ndarray,
    scratch: np.ndarray,
    out: np.ndarray,
    sizes: np.ndarray,
) -> int:
    """Codes uint8 `symbols`, runs of RUN and perhaps a shorter last one, into uint8 `out`; returns its bytes.

    `lows` are uint8 of `low_bits` bits; `escaped`, uint16 of the symbols' size, has the words of ESCAPEs. `sizes`,
    int64 [runs], gets the bytes of each run, `scratch` is uint8 [4, SCRATCH]. `out` has room for the runs and eight
    bytes more, and eight more may be read behind the symbols and lows.
    """
    book, states, address = address_of(entries), address_of(following), address_of(symbols)
    at, first, whole, begins = 0, 0, symbols.size // RUN, np.empty(4, np.int64)
    while first < sizes.size:
        together = 4 if first + 4 <= whole else 1
        if together == 4:
            begins[0], begins[1], begins[2], begins[3] = _four(address + first * RUN, book, states, address_of(scratch))
        else:
            size = min(RUN, symbols.size - first * RUN)
            begins[0] = _one(address + first * RUN, size, book, states, address_of(scratch) + SCRATCH - 8)
        for k in range(together):
            start, before = (first + k) * RUN, at
            size = min(RUN, symbols.size - start)
            begin, end = begins[k], address_of(scratch) + (k + 1) * SCRATCH - 8
            store16(address_of(out) + at, load16(begin))
            at += 2
            for bit in range(low_bits):
                at = _pack_plane(lows[start : start + size], bit, out, at)
            for i in range(0, end - begin - 2, 8):
                store64(address_of(out) + at + i, load64(begin + 2 + i))
            at += end - begin - 2
            if escaping:
                at = _pack_escapes(address + start, size, address_of(escaped) + 2 * start, address_of(out), at)
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
