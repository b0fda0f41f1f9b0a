"""Numba kernels of the ecq decoder: runs of bits to symbols, symbols to bf16.

Every weight is one step: look the state up, put its symbol out, add fresh bits to get the next state. So all runs take
the same steps, four of them in one loop, because a step waits for the one before it. The way back to the weight is a
multiplication in vector registers.

No input can make a kernel loop for ever or leave its buffers: a run has as many steps as weights, a step uses at most
12 bits, and the caller sees to it that so much can be read behind every run's start. A run that does not end in the
coder's first state and at its own last byte is reported.
"""

# mypy: disable-error-code="arg-type,assignment,call-arg,call-overload,index,operator,return-value,var-annotated"
# (numba types these functions itself, and more strictly)

from __future__ import annotations

import numpy as np
from numba import njit

from bagel_compress.codecs.ecq.layout import CENTRE, MAX_LOW_BITS, RUN, STATE_BITS, STATES
from bagel_compress.codecs.ecq.pack import count_escapes, escape_marks, states_of
from bagel_compress.codecs.kernels.addresses import (
    address_of,
    load8,
    load16,
    load32,
    load64,
    store8,
    store16,
    store64,
    trailing_zeros,
)
from bagel_compress.codecs.kernels.bf16_kernels import bf16_word

# Bytes behind the first of a run that a decoder may read whatever they hold: low bits, steps, header, a load of eight.
READ_SLACK = RUN * (STATE_BITS + MAX_LOW_BITS) // 8 + 16
_U = np.uint64
_ONE = _U(1)
_BYTE = _U(255)
_SHIFT = _U(63)
_SPREAD = _U(0x0101010101010101)
_SELECT = _U(0x8040201008040201)
_CARRY = _U(0x7F7F7F7F7F7F7F7F)
_HIGH = _U(0x8080808080808080)

_compiled = njit(nogil=True, cache=True)
_inlined = njit(nogil=True, inline="always")


@_compiled
def decoder(frequencies: np.ndarray) -> np.ndarray:
    """uint32 [4096] by state: symbol (8 bits), bits to read (8 bits), next state without them (16 bits)."""
    symbols, seen = states_of(frequencies), frequencies.copy()
    table = np.empty(STATES, np.uint32)
    for state in range(STATES):
        x, bits = seen[symbols[state]], 0
        seen[symbols[state]] += 1
        while (x << bits) < STATES:
            bits += 1
        table[state] = symbols[state] | (bits << 8) | (((x << bits) - STATES) << 16)
    return table


@_inlined
def _four_steps(stream, at, state, table, out):  # type: ignore[no-untyped-def]
    """Four symbols of one run to `out`, from bit `at` on; all but the state are addresses or bit counts."""
    word, total = load64(stream + (at >> 3)) >> _U(at & 7), _U(0)
    for k in range(4):
        entry = table + np.int64(state << _U(2))
        bits = load8(entry + 1)
        store8(out + k, load8(entry))
        state = load16(entry + 2) + (word & ((_ONE << bits) - _ONE))
        word >>= bits
        total += bits
    return at + np.int64(total), state


@_inlined
def _open(stream, run, planes):  # type: ignore[no-untyped-def]
    """First bit and state of the run at byte `run`, behind `planes` bytes of low bits."""
    header = load16(stream + run)
    return 8 * (run + 2 + planes) + np.int64(header >> _U(STATE_BITS)), header & _U(STATES - 1)


@_compiled
def _four_runs(stream, a, b, c, d, planes, table, out):  # type: ignore[no-untyped-def]
    """Symbols of four whole runs, at four bytes of the stream: the bits after them, and all end states or-ed."""
    at_a, state_a = _open(stream, a, planes)
    at_b, state_b = _open(stream, b, planes)
    at_c, state_c = _open(stream, c, planes)
    at_d, state_d = _open(stream, d, planes)
    for i in range(out, out + RUN, 4):
        at_a, state_a = _four_steps(stream, at_a, state_a, table, i)
        at_b, state_b = _four_steps(stream, at_b, state_b, table, i + RUN)
        at_c, state_c = _four_steps(stream, at_c, state_c, table, i + 2 * RUN)
        at_d, state_d = _four_steps(stream, at_d, state_d, table, i + 3 * RUN)
    return at_a, at_b, at_c, at_d, state_a | state_b | state_c | state_d


@_compiled
def _one_run(stream, run, planes, size, table, out):  # type: ignore[no-untyped-def]
    """The same for one run of any size."""
    at, state = _open(stream, run, planes)
    for i in range(size):
        entry = load32(table + np.int64(state << _U(2)))
        word = load64(stream + (at >> 3)) >> _U(at & 7)
        store8(out + i, entry)
        bits = (entry >> _U(8)) & _BYTE
        state = (entry >> _U(16)) + (word & ((_ONE << bits) - _ONE))
        at += np.int64(bits)
    return at, state


@_compiled
def _symbols(  # type: ignore[no-untyped-def]
    first, together, stream, offsets, weights, table, low_bits, escaping, symbols, escapes
):
    """Symbols of one run or of four together, and the ESCAPEs of each: whether all end where and as they have to."""
    ends = np.empty(4, np.int64)
    if together == 4:
        ends[0], ends[1], ends[2], ends[3], state = _four_runs(
            stream,
            offsets[first],
            offsets[first + 1],
            offsets[first + 2],
            offsets[first + 3],
            low_bits * (RUN // 8),
            table,
            symbols,
        )
    else:
        size = min(RUN, weights - first * RUN)
        ends[0], state = _one_run(stream, offsets[first], low_bits * ((size + 7) >> 3), size, table, symbols)
    whole = state == _U(0)
    for k in range(together):
        size = min(RUN, weights - (first + k) * RUN)
        escapes[k] = count_escapes(symbols + k * RUN, size) if escaping else 0
        whole &= ends[k] == 8 * (offsets[first + k + 1] - 2 * escapes[k])
    return whole


@_compiled
def unpack_runs(
    runs: tuple[int, int],
    stream: int,
    offsets: np.ndarray,
    weights: int,
    table: np.ndarray,
    low_bits: int,
    escaping: bool,
    step: np.float32,
    column_steps: np.ndarray,
    out: np.ndarray,
) -> bool:
    """Runs [first, last) of a weight into uint16 `out`, whose first word is that of the first run's first weight.

    `stream` is the address of its byte 0; `offsets`, int64, has every run's first byte and the end of the last;
    `weights` are those of the whole matrix; `escaping`: ESCAPE has a frequency. `column_steps`, fp32, replaces `step`
    unless it is empty. Returns whether every run ended where and as it has to.
    """
    symbols, lows = np.empty(4 * RUN + 8, np.uint8), np.zeros(RUN + 8, np.uint8)
    target, lookup, first, escapes = address_of(symbols), address_of(table), runs[0], np.zeros(4, np.int64)
    while first < runs[1]:
        together = 4 if first + 4 <= min(runs[1], weights // RUN) else 1
        if not _symbols(first, together, stream, offsets, weights, lookup, low_bits, escaping, target, escapes):
            return False
        for k in range(together):
            run = first + k
            size, start = min(RUN, weights - run * RUN), (run - runs[0]) * RUN
            part, words = symbols[k * RUN : k * RUN + size], out[start : start + size]
            if low_bits:
                _low_bits(stream + offsets[run] + 2, low_bits, size, address_of(lows))
            if column_steps.size:
                _values_by_column(part, lows, low_bits, column_steps, run * RUN, words)
            else:
                values(part, lows, low_bits, step, words)
            if escapes[k]:
                _put_escapes(target + k * RUN, size, stream + offsets[run + 1], address_of(words))
        first += together
    return True


@_compiled
def verify_runs(
    stream: int,
    offsets: np.ndarray,
    table: np.ndarray,
    low_bits: int,
    escaping: bool,
    symbols: np.ndarray,
    lows: np.ndarray,
    escaped: np.ndarray,
) -> bool:
    """Whether runs that were just packed decode to the uint8 `symbols`, `lows` and, at ESCAPEs, uint16 `escaped`.

    `stream` and `offsets` as in `unpack_runs`, from the first of the runs on. Up to seven bytes behind are read.
    """
    found, low = np.empty(4 * RUN + 8, np.uint8), np.zeros(RUN + 8, np.uint8)
    lookup, first, escapes = address_of(table), 0, np.zeros(4, np.int64)
    runs, weights = offsets.size - 1, symbols.size
    while first < runs:
        target = address_of(found)  # in the loop: after its last use numba frees an array
        together = 4 if first + 4 <= weights // RUN else 1
        if not _symbols(first, together, stream, offsets, weights, lookup, low_bits, escaping, target, escapes):
            return False
        for k in range(together):
            run = first + k
            start, size = run * RUN, min(RUN, weights - run * RUN)
            if _differ(target + k * RUN, address_of(symbols) + start, size):
                return False
            if low_bits:
                _low_bits(stream + offsets[run] + 2, low_bits, size, address_of(low))
                if _differ(address_of(low), address_of(lows) + start, size):
                    return False
            if escapes[k] and _escapes_differ(
                target + k * RUN, size, stream + offsets[run + 1], address_of(escaped) + 2 * start
            ):
                return False
        first += together
    return True


@_compiled
def _differ(a, b, size):  # type: ignore[no-untyped-def]
    """Whether the bytes at two addresses differ; up to seven more are read."""
    different, whole = _U(0), size >> 3
    for i in range(whole):
        different |= load64(a + 8 * i) ^ load64(b + 8 * i)
    if size & 7:
        different |= (load64(a + 8 * whole) ^ load64(b + 8 * whole)) & ((_ONE << _U(8 * (size & 7))) - _ONE)
    return different != _U(0)


@_compiled
def _escapes_differ(symbols, size, stored, words):  # type: ignore[no-untyped-def]
    """Whether weights stored in front of `stored`, first one last, are others than uint16 `words` has at ESCAPEs."""
    for i in range(0, size, 8):
        marks = escape_marks(load64(symbols + i))
        if size - i < 8:
            marks &= (_ONE << _U(8 * (size - i))) - _ONE
        while marks:
            stored -= 2
            if load16(words + 2 * (i + np.int64(trailing_zeros(marks) >> _U(3)))) != load16(stored):
                return True
            marks &= marks - _ONE
    return False


@_compiled
def _low_bits(planes, low_bits, size, lows):  # type: ignore[no-untyped-def]
    """The low bits of `size` weights, from planes of bits at an address, to bytes at another (with room for 8 more)."""
    plane = (size + 7) >> 3
    for i in range(plane):
        eight = _U(0)
        for bit in range(low_bits):
            chosen = (load8(planes + bit * plane + i) * _SPREAD) & _SELECT
            eight |= (((chosen + _CARRY) & _HIGH) >> _U(7)) << _U(bit)
        store64(lows + 8 * i, eight)


@_compiled
def values(symbols: np.ndarray, lows: np.ndarray, low_bits: int, step: np.float32, words: np.ndarray) -> None:
    """uint16 words of the weights that uint8 `symbols` and `lows` stand for; of no meaning at ESCAPE."""
    if low_bits:
        _values_with_low_bits(symbols, lows, low_bits, step, words)
    else:
        _values(symbols, step, words)


@_compiled
def _values(symbols: np.ndarray, step: np.float32, words: np.ndarray) -> None:
    for i in range(words.size):
        words[i] = bf16_word(np.float32(np.int32(symbols[i]) - np.int32(CENTRE)) * step)


@_compiled
def _values_with_low_bits(
    symbols: np.ndarray, lows: np.ndarray, low_bits: int, step: np.float32, words: np.ndarray
) -> None:
    factor = np.int32(1 << low_bits)
    for i in range(words.size):
        code = np.int32((np.int32(symbols[i]) - np.int32(CENTRE)) * factor + np.int32(lows[i]))
        words[i] = bf16_word(np.float32(code) * step)


@_compiled
def _values_by_column(
    symbols: np.ndarray, lows: np.ndarray, low_bits: int, steps: np.ndarray, first: int, words: np.ndarray
) -> None:
    """`first` is the flat index of the first weight; `lows` are zeros without low bits."""
    factor, start, column = np.int32(1 << low_bits), 0, first % steps.size
    while start < words.size:
        size = min(steps.size - column, words.size - start)
        of = steps[column : column + size]
        part, low, target = symbols[start : start + size], lows[start : start + size], words[start : start + size]
        for i in range(size):
            code = np.int32((np.int32(part[i]) - np.int32(CENTRE)) * factor + np.int32(low[i]))
            target[i] = bf16_word(np.float32(code) * of[i])
        start, column = start + size, 0


@_compiled
def _put_escapes(symbols, size, escaped, words):  # type: ignore[no-untyped-def]
    """Weights stored as they are, the first in front of `escaped`, to the places of ESCAPE; addresses but `size`."""
    for i in range(0, size, 8):
        marks = escape_marks(load64(symbols + i))
        if size - i < 8:
            marks &= (_ONE << _U(8 * (size - i))) - _ONE
        while marks:
            escaped -= 2
            store16(words + 2 * (i + np.int64(trailing_zeros(marks) >> _U(3))), load16(escaped))
            marks &= marks - _ONE
