"""Numba kernels of the DF11 decoder. Every gap and block position that it passes must be right; for the encoder it
finds them instead, while it verifies a fresh stream.

A table of 12 bits gives up to six exponents per lookup and, beside them, one bit where each code ends: the ends that
cross a 64-bit window are compared with the stored gap. Codes over 12 bits are walked through the stored tables.
A lookup waits for the one before it, so two runs whose starts are known, chunks or blocks, are decoded in one loop.
Kernels call each other with addresses and numbers only, and the innermost are inlined: numba counts references to
every array that it passes, which took longer than the decoding.

No input can make a kernel loop for ever or leave its buffers: each step uses 1 to 80 bits of a bounded stream and the
counts were checked by the caller; what does not fit is reported by a status.
"""

# mypy: disable-error-code="arg-type,assignment,call-arg,call-overload,index,operator,return-value,var-annotated"
# (numba types these functions itself, and more strictly)

from __future__ import annotations

import numpy as np
from numba import njit

from bagel_compress.codecs.df11.layout import BLOCK_BITS, FIRST_POINTER
from bagel_compress.codecs.kernels.addresses import (
    address_of,
    byteswap,
    load8,
    load64,
    ones,
    store8,
    store64,
    trailing_zeros,
)

LOOKUP_BITS = 12
SCRATCH_SLACK = 32  # exponents written beyond a run's count
READ_SLACK = 16  # bytes read beyond a run's last code
OK, BAD_CODE, BAD_GAP, BAD_POSITION, BAD_END = 0, 1, 2, 3, 4
REASONS = {
    BAD_CODE: "encoded_exponent holds bits that are no code of its luts",
    BAD_GAP: "gaps and encoded_exponent do not agree",
    BAD_POSITION: "output_positions and encoded_exponent do not agree",
    BAD_END: "encoded_exponent ends before or after its weights",
}
_U = np.uint64
_PER_LOOKUP = 6
_TOP = _U(64 - LOOKUP_BITS)
_ENDS = _U(0xFFF)
_STEP_CODES, _STEP_BITS = 4 * _PER_LOOKUP + 1, 64  # a step may start where this many codes and bits are left
_BROKEN = 1 << 62  # a position behind every stream: there was no code

_compiled = njit(nogil=True, cache=True)
_inlined = njit(nogil=True, inline="always")


@_compiled
def _walk(luts: int, tables: int, bits: int) -> tuple[int, int]:
    """Exponent and code length of the code at the top of the 32-bit `bits`; length 0 if the tables give none.

    `luts` is the address of `tables` rows of 256 bytes and one more, the lengths.
    """
    row = 0
    for level in range(4):
        value = np.int64(load8(luts + 256 * row + np.int64((bits >> _U(24 - 8 * level)) & _U(255))))
        if value < FIRST_POINTER:
            length = np.int64(load8(luts + 256 * tables + value))
            return value, length if 8 * level < length <= 8 * level + 8 else 0
        row = 256 - value
        if row >= tables:
            break
    return 0, 0


@_compiled
def lookup_table(luts: np.ndarray, lookup_bits: int = LOOKUP_BITS) -> np.ndarray:
    """uint64 [2^bits] for the next (at most 12) bits: six exponents of 8 bits, 12 bits of code ends, 4 of their length.

    Length 0: the first code is longer than that, or none.
    """
    table = np.zeros(1 << lookup_bits, np.uint64)
    address, tables = address_of(luts), luts.shape[0] - 1
    for index in range(1 << lookup_bits):
        used, entry = 0, _U(0)
        for k in range(_PER_LOOKUP):
            left = (_U(index) << _U(32 - lookup_bits + used)) & _U(0xFFFFFFFF)
            exponent, length = _walk(address, tables, left)
            other, _ = _walk(address, tables, left | ((_U(1) << _U(32 - lookup_bits + used)) - _U(1)))
            if length == 0 or used + length > lookup_bits or exponent != other:  # slots below EOF repeat neighbours
                break
            used += length
            entry |= (_U(exponent) << _U(8 * k)) | (_U(1) << _U(47 + used))
        table[index] = entry | (_U(used) << _U(60))
    return table


@_inlined
def _word_at(stream, at):  # type: ignore[no-untyped-def]
    """The next 57 bits or more of a stream, left-aligned."""
    return byteswap(load64(stream + (at >> 3))) << _U(at & 7)


@_inlined
def _gap(gaps, window, gap, spare):  # type: ignore[no-untyped-def]
    """Stores the gap of a window, or gives what it differs by."""
    if spare:
        store8(gaps + window, _U(gap))
        return _U(0)
    return _U(gap) ^ load8(gaps + window)


@_inlined
def _position(positions, window, weight, spare):  # type: ignore[no-untyped-def]
    """Stores the position of the block that starts with a window, or gives what it differs by."""
    place = positions + 8 * (window >> 9)
    if spare:
        store64(place, _U(weight))
        return _U(0)
    return _U(weight) ^ load64(place)


@_inlined
def _step(stream, at, n, target, table, luts, tables, gaps, positions, spare, first, gap_fault, position_fault):  # type: ignore[no-untyped-def]
    """Four lookups, and the code that the last of them found no entry for: exponents n.. to `target`, from bit `at`.

    All but numbers are addresses: of bit 0 of the stream, of the gap of window 0, of the position of block 0. `first`
    is the index of the run's first weight. What differs from the stored gap or position enters the faults; if there is
    a `spare`, the address of a byte that takes what is no gap, they are stored instead.
    """
    word, ends, total, added, length = _word_at(stream, at), _U(0), _U(0), 0, _U(0)
    for _ in range(4):
        entry = load64(table + np.int64((word >> _TOP) << _U(3)))
        store64(target + n + added, entry)
        length = entry >> _U(60)
        mask = (entry >> _U(48)) & _ENDS
        ends |= mask << total
        total += length
        added += np.int64(ones(mask))
        word <<= length
    room = _U(63) - _U(at & 63)
    over, window = ends >> room, (at >> 6) + 1
    gap = trailing_zeros(over)
    # No branch on `over`: whether a window was crossed is as good as random.
    if spare:
        store8(gaps + window if over != _U(0) else spare, gap)
    else:
        gap_fault |= (gap ^ load8(gaps + window)) & (_U(0) - _U(over != _U(0)))
    if window & 511 == 0 and over != _U(0):
        started = n + np.int64(ones(ends & ((_U(2) << (room + gap)) - _U(1))))
        position_fault |= _position(positions, window, first + started, spare)
    at += np.int64(total)
    n += added
    if length == _U(0):
        exponent, bits = _walk(luts, tables, _word_at(stream, at) >> _U(32))
        store64(target + n, _U(exponent))
        n += 1
        window = (at + bits) >> 6
        if window != at >> 6:
            gap_fault |= _gap(gaps, window, (at + bits) & 63, spare)
            if window & 511 == 0:
                position_fault |= _position(positions, window, first + n, spare)
        at = at + bits if bits else _BROKEN
    return at, n, gap_fault, position_fault


@_compiled
def _pair(  # type: ignore[no-untyped-def]
    stream,
    at,
    end,
    count,
    first,
    target,
    gaps,
    at2,
    end2,
    count2,
    first2,
    target2,
    gaps2,
    table,
    luts,
    tables,
    positions,
    spare,
):
    """Two runs at once, until one of them is nearly done: (bit, exponents) of each, and the faults of both."""
    n, n2, gap_fault, position_fault = 0, 0, _U(0), _U(0)
    while (
        at + _STEP_BITS <= end and n + _STEP_CODES <= count and at2 + _STEP_BITS <= end2 and n2 + _STEP_CODES <= count2
    ):
        at, n, gap_fault, position_fault = _step(
            stream, at, n, target, table, luts, tables, gaps, positions, spare, first, gap_fault, position_fault
        )
        at2, n2, gap_fault, position_fault = _step(
            stream, at2, n2, target2, table, luts, tables, gaps2, positions, spare, first2, gap_fault, position_fault
        )
    return at, n, at2, n2, gap_fault, position_fault


@_compiled
def _run(stream, at, end, n, count, first, is_last, target, gaps, table, luts, tables, positions, spare):  # type: ignore[no-untyped-def]
    """A run from its n-th code to its last; they must start before bit `end`. Returns (status, bit after).

    If the unit's last weight (`is_last`) ends in a window in which no code starts, that window's gap holds where the
    padding starts, and 0 if there is none.
    """
    gap_fault, position_fault = _U(0), _U(0)
    while at + _STEP_BITS <= end and n + _STEP_CODES <= count:
        at, n, gap_fault, position_fault = _step(
            stream, at, n, target, table, luts, tables, gaps, positions, spare, first, gap_fault, position_fault
        )
    while n < count and at < _BROKEN:
        if at >= end:
            return BAD_END, at
        exponent, bits = _walk(luts, tables, _word_at(stream, at) >> _U(32))
        store64(target + n, _U(exponent))
        n += 1
        window = (at + bits) >> 6
        if window != at >> 6:
            unpadded = is_last and n == count and (at + bits) & 7 == 0
            gap_fault |= _gap(gaps, window, 0 if unpadded else (at + bits) & 63, spare)
            if window & 511 == 0:
                position_fault |= _position(positions, window, first + n, spare)
        at = at + bits if bits else _BROKEN
    if at >= _BROKEN:
        return BAD_CODE, at
    if position_fault != _U(0):
        return BAD_POSITION, at
    return (OK if gap_fault == _U(0) else BAD_GAP), at


@_compiled
def join(exponents: np.ndarray, rest: np.ndarray, out: np.ndarray) -> None:
    """Exponents and sign-mantissa bytes to bf16 words."""
    for i in range(out.size):
        byte = np.uint16(rest[i])
        out[i] = (
            ((byte & np.uint16(0x80)) << np.uint16(8))
            | (np.uint16(exponents[i]) << np.uint16(7))
            | (byte & np.uint16(0x7F))
        )


@_compiled
def verify(
    words: np.ndarray,
    chunk: int,
    stream: int,
    first: int,
    weights: int,
    bits: np.ndarray,
    rest: np.ndarray,
    table: np.ndarray,
    luts: np.ndarray,
    gaps: np.ndarray,
    positions: np.ndarray,
    exponents: np.ndarray,
    scratch: np.ndarray,
) -> bool:
    """Decodes one or two chunks of `chunk` weights; whether they are the uint16 `words` that they were made from.

    `stream` is the address of bit 0 of the unit's stream, of which bits [bits[k], bits[k + 1]) are chunk k; the first
    weight is the unit's weight `first` of `weights`. On the way `gaps` and `positions`, arrays of the whole unit, get
    what the codes' ends say. `exponents` is uint8 [2, chunk + SCRATCH_SLACK] scratch, `scratch` uint16 [chunk]; its
    first byte takes what is no gap.
    """
    book = (address_of(table), address_of(luts), luts.shape[0] - 1, address_of(positions), address_of(scratch))
    target, target2, gap = address_of(exponents[0]), address_of(exponents[1]), address_of(gaps)
    at, n, at2, n2, last = bits[0], 0, bits[1], 0, bits.size - 1
    if last == 2:
        at, n, at2, n2, _, _ = _pair(
            stream, at, bits[1], chunk, first, target, gap,
            at2, bits[2], words.size - chunk, first + chunk, target2, gap, *book,
        )  # fmt: skip
    for k in range(last):
        begin, stop = k * chunk, min((k + 1) * chunk, words.size)
        status, after = _run(
            stream, at2 if k else at, bits[k + 1], n2 if k else n, stop - begin, first + begin, first + stop == weights,
            target2 if k else target, gap, *book,
        )  # fmt: skip
        if status != OK or after != bits[k + 1] or _differ(exponents[k], rest[begin:stop], words[begin:stop], scratch):
            return False
    return True


@_compiled
def _differ(exponents: np.ndarray, rest: np.ndarray, words: np.ndarray, scratch: np.ndarray) -> bool:
    """Differences go through uint16 `scratch`: numba would add them up in 64 bits, at a quarter of the speed."""
    for i in range(words.size):
        byte = np.uint16(rest[i])
        word = ((byte & np.uint16(0x80)) << np.uint16(8)) | (byte & np.uint16(0x7F))
        scratch[i] = words[i] ^ (word | (np.uint16(exponents[i]) << np.uint16(7)))
    whole = words.size // 4 * 4
    different, fours = _U(0), scratch[:whole].view(np.uint64)
    for i in range(fours.size):
        different |= fours[i]
    for i in range(whole, words.size):
        different |= _U(scratch[i])
    return different != _U(0)


@_compiled
def _unpack_gaps(packed: np.ndarray, block: int, gaps: np.ndarray) -> None:
    """The 512 gaps of a block and the first of the next one, if there is one, into uint8 `gaps` [513]."""
    begin = 320 * block
    for k in range(64):
        word = _U(0)
        for j in range(5):
            word = (word << _U(8)) | _U(packed[begin + 5 * k + j])
        for j in range(8):
            gaps[8 * k + j] = np.uint8((word >> _U(35 - 5 * j)) & _U(31))
    gaps[512] = packed[begin + 320] >> np.uint8(3) if begin + 320 < packed.size else np.uint8(0)


@_compiled
def unpack_blocks(
    blocks: tuple[int, int],
    stream: int,
    stream_bytes: int,
    table: np.ndarray,
    luts: np.ndarray,
    packed_gaps: np.ndarray,
    positions: np.ndarray,
    rest: np.ndarray,
    out: np.ndarray,
) -> int:
    """`blocks` of a unit into uint16 `out` [weights]; returns the first status that is not OK."""
    gaps = np.zeros((2, 513), np.uint8)
    exponents = np.empty((2, BLOCK_BITS + SCRATCH_SLACK), np.uint8)
    book = (address_of(table), address_of(luts), luts.shape[0] - 1, address_of(positions), 0)
    target, target2 = address_of(exponents[0]), address_of(exponents[1])
    for block in range(blocks[0], blocks[1], 2):
        last = min(block + 2, blocks[1])
        for b in range(block, last):
            _unpack_gaps(packed_gaps, b, gaps[b - block])
        if block == 0 and gaps[0, 0] != 0:  # the first gap of any other block is checked by the block before
            return BAD_GAP
        start, start2, end = block * BLOCK_BITS, (block + 1) * BLOCK_BITS, 8 * stream_bytes
        gap, gap2 = address_of(gaps[0]) - (start >> 6), address_of(gaps[1]) - (start2 >> 6)
        at, n, at2, n2 = start + np.int64(gaps[0, 0]), 0, start2 + np.int64(gaps[1, 0]), 0
        if last == block + 2:
            middle, stop = positions[block + 1], positions[block + 2]
            at, n, at2, n2, gap_fault, position_fault = _pair(
                stream, at, start2, middle - positions[block], positions[block], target, gap,
                at2, min(start2 + BLOCK_BITS, end), stop - middle, middle, target2, gap2, *book,
            )  # fmt: skip
            if gap_fault | position_fault:
                return BAD_POSITION if position_fault else BAD_GAP
        for b in range(block, last):
            second = b > block
            first, stop = positions[b], positions[b + 1]
            status, after = _run(
                stream, at2 if second else at, min((b + 1) * BLOCK_BITS, end), n2 if second else n, stop - first, first,
                stop == rest.size, target2 if second else target, gap2 if second else gap, *book,
            )  # fmt: skip
            if status == OK:
                status = _check_end(b, after, first, stop, rest.size, end, gaps[b - block])
            if status != OK:
                return status
            join(exponents[b - block, : stop - first], rest[first:stop], out[first:stop])
    return OK


@_compiled
def _check_end(block: int, at: int, first: int, stop: int, weights: int, end: int, gaps: np.ndarray) -> int:
    """A block ends where the next begins; the unit's last code in the stream's last byte, without gaps behind it."""
    start = block * BLOCK_BITS
    if stop < weights:
        return OK if at >= min(start + BLOCK_BITS, end) else BAD_END
    if stop > first and not 0 <= end - at < 8:
        return BAD_END
    for window in range((at >> 6) + 1 if stop > first else (start >> 6) + 1, (start >> 6) + 512):
        if gaps[window - (start >> 6)] != 0:
            return BAD_GAP
    return OK
