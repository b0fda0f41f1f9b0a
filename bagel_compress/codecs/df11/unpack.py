"""Numba kernels of the DF11 decoder, which also verifies: every gap and block position it passes must be right.

A table of 12 bits gives up to six exponents per lookup and, beside them, one bit where each code ends: the ends that
cross a 64-bit window are compared with the stored gap. Codes over 12 bits are walked through the stored tables.
No input can make a kernel loop for ever or leave its buffers: each step uses 1 to 48 bits of a bounded stream and the
counts were checked by the caller; what does not fit is reported by a status.
"""

# mypy: disable-error-code="arg-type,assignment,call-arg,call-overload,index,operator,return-value,var-annotated"
# (numba types these functions itself, and more strictly)

from __future__ import annotations

import numpy as np
from numba import njit

from bagel_compress.codecs.df11.layout import BLOCK_BITS, FIRST_POINTER
from bagel_compress.codecs.df11.words import byteswap, load64, ones, store64, trailing_zeros

LOOKUP_BITS = 12
SCRATCH_SLACK = 32  # exponents written beyond a run's count
READ_SLACK = 16  # bytes read beyond a run's last code
OK, BAD_CODE, BAD_GAP, BAD_POSITION, BAD_END, DIFFERENT = 0, 1, 2, 3, 4, 5
_U = np.uint64
_PER_LOOKUP = 6
_TOP = _U(64 - LOOKUP_BITS)
_ENDS = _U(0xFFF)
_LONGEST_RUN = 4 * _PER_LOOKUP


@njit(nogil=True, cache=True)
def _walk(luts: np.ndarray, bits: int) -> tuple[int, int]:
    """Exponent and code length of the code at the top of the 32-bit `bits`; length 0 if the tables give none."""
    row = 0
    for level in range(4):
        value = luts[row, (bits >> _U(24 - 8 * level)) & _U(255)]
        if value < FIRST_POINTER:
            length = luts[-1, value]
            fits = 8 * level < length <= 8 * level + 8
            return np.int64(value), np.int64(length) if fits else np.int64(0)
        row = 256 - np.int64(value)
        if row >= luts.shape[0] - 1:
            break
    return 0, 0


@njit(nogil=True, cache=True)
def lookup_table(luts: np.ndarray, lookup_bits: int = LOOKUP_BITS) -> np.ndarray:
    """uint64 [2^bits] for the next (at most 12) bits: six exponents of 8 bits, 12 bits of code ends, 4 of their length.

    Length 0: the first code is longer than that, or none.
    """
    table = np.zeros(1 << lookup_bits, np.uint64)
    for index in range(1 << lookup_bits):
        used, entry = 0, _U(0)
        for k in range(_PER_LOOKUP):
            left = (_U(index) << _U(32 - lookup_bits + used)) & _U(0xFFFFFFFF)
            exponent, length = _walk(luts, left)
            other, _ = _walk(luts, left | ((_U(1) << _U(32 - lookup_bits + used)) - _U(1)))
            if length == 0 or used + length > lookup_bits or exponent != other:  # slots below EOF repeat neighbours
                break
            used += length
            entry |= (_U(exponent) << _U(8 * k)) | (_U(1) << _U(47 + used))
        table[index] = entry | (_U(used) << _U(60))
    return table


@njit(nogil=True, cache=True)
def _look_up_four(word: int, table: np.ndarray, target: int) -> tuple[int, int, int, int]:
    """Four entries for the top 48 bits of `word`; their exponents go to `target`.

    Returns their code ends as one mask, their bits, the number of exponents, and the bits of the fourth: 0 if one of
    them, and so all after it, found no code in its 12 bits.
    """
    ends, total, count, length = _U(0), _U(0), 0, _U(0)
    for _ in range(4):
        entry = table[word >> _TOP]
        store64(target + count, entry)
        length = entry >> _U(60)
        mask = (entry >> _U(48)) & _ENDS
        ends |= mask << total
        total += length
        count += np.int64(ones(mask))
        word <<= length
    return ends, total, count, length


@njit(nogil=True, cache=True)
def _run(
    stream: int,
    at: int,
    end: int,
    count: int,
    first: int,
    is_last: bool,
    table: np.ndarray,
    luts: np.ndarray,
    gaps: np.ndarray,
    gap_base: int,
    positions: np.ndarray,
    exponents: np.ndarray,
) -> tuple[int, int]:
    """`count` codes from bit `at` into `exponents`; they must start before bit `end`. Returns (status, bit after).

    `stream` is the address of bit 0, `first` the index of the first weight; `gaps` begins at window `gap_base`. If the
    unit's last weight (`is_last`) ends in a window in which no code starts, that window's gap holds where the padding
    starts, and 0 if there is none.
    """
    n, target = 0, np.int64(exponents.ctypes.data)
    wrong = _U(0)
    while n < count:
        if at + 64 <= end and n + _LONGEST_RUN < count:
            word = byteswap(load64(stream + (at >> 3))) << _U(at & 7)
            ends, total, added, length4 = _look_up_four(word, table, target + n)
            room = _U(64 - (at & 63))
            if total >= room:
                window = (at >> 6) + 1
                gap = trailing_zeros(ends >> (room - _U(1)))
                wrong |= gap ^ _U(gaps[window - gap_base])
                if window & 511 == 0 and positions[window >> 9] != first + n + np.int64(
                    ones(ends & ((_U(2) << (room - _U(1) + gap)) - _U(1)))
                ):
                    return BAD_POSITION, at
            at += np.int64(total)
            n += added
            if length4 > _U(0):
                continue
        if at >= end:
            return BAD_END, at
        word = (byteswap(load64(stream + (at >> 3))) << _U(at & 7)) >> _U(32)
        exponent, length = _walk(luts, word)
        if length == 0:
            return BAD_CODE, at
        exponents[n] = exponent
        n += 1
        if (at + length) >> 6 != at >> 6:
            window = (at + length) >> 6
            unpadded = is_last and n == count and (at + length) & 7 == 0
            wrong |= _U(0 if unpadded else (at + length) & 63) ^ _U(gaps[window - gap_base])
            if window & 511 == 0 and positions[window >> 9] != first + n:
                return BAD_POSITION, at
        at += length
    return (OK if wrong == _U(0) else BAD_GAP), at


@njit(nogil=True, cache=True)
def _merge(exponents: np.ndarray, rest: np.ndarray, out: np.ndarray) -> None:
    """Exponents and sign-mantissa bytes to bf16 words."""
    for i in range(out.size):
        byte = np.uint16(rest[i])
        out[i] = (
            ((byte & np.uint16(0x80)) << np.uint16(8))
            | (np.uint16(exponents[i]) << np.uint16(7))
            | (byte & np.uint16(0x7F))
        )


@njit(nogil=True, cache=True)
def verify_chunks(
    chunks: tuple[int, int],
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
) -> int:
    """Decodes `chunks` of `chunk` weights and compares them with the uint16 `words` they were made from: status.

    `stream` is the address of bit 0 of the unit's stream, of which bits [bits[k], bits[k + 1]) are chunk k.
    """
    for k in range(chunks[0], chunks[1]):
        begin, stop = k * chunk, min((k + 1) * chunk, words.size)
        status = _verify(
            stream, bits[k : k + 2], first + begin, first + stop == weights, table, luts, gaps, positions,
            exponents, rest[begin:stop], words[begin:stop],
        )  # fmt: skip
        if status != OK:
            return status
    return OK


@njit(nogil=True, cache=True)
def _verify(
    stream: int,
    bits: np.ndarray,
    first: int,
    is_last: bool,
    table: np.ndarray,
    luts: np.ndarray,
    gaps: np.ndarray,
    positions: np.ndarray,
    exponents: np.ndarray,
    rest: np.ndarray,
    words: np.ndarray,
) -> int:
    status, at = _run(stream, bits[0], bits[1], words.size, first, is_last, table, luts, gaps, 0, positions, exponents)
    if status != OK:
        return status
    different = np.uint16(0)
    for i in range(words.size):
        byte = np.uint16(rest[i])
        word = ((byte & np.uint16(0x80)) << np.uint16(8)) | (byte & np.uint16(0x7F))
        different |= words[i] ^ (word | (np.uint16(exponents[i]) << np.uint16(7)))
    if different != 0:
        return DIFFERENT
    return OK if at == bits[1] else BAD_END


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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
    gaps = np.zeros(513, np.uint8)
    exponents = np.empty(BLOCK_BITS + SCRATCH_SLACK, np.uint8)
    for block in range(blocks[0], blocks[1]):
        first, stop = positions[block], positions[block + 1]
        start = block * BLOCK_BITS
        end = min(start + BLOCK_BITS, 8 * stream_bytes)
        _unpack_gaps(packed_gaps, block, gaps)
        if block == 0 and gaps[0] != 0:  # the first gap of any other block is checked by the block before
            return BAD_GAP
        is_last = stop == rest.size
        status, at = _run(
            stream, start + gaps[0], end, stop - first, first, is_last, table, luts, gaps, start >> 6,
            positions, exponents,
        )  # fmt: skip
        if status != OK:
            return status
        if is_last:
            if stop > first and not 0 <= 8 * stream_bytes - at < 8:
                return BAD_END
            for window in range((at >> 6) + 1 if stop > first else (start >> 6) + 1, (start >> 6) + 512):
                if gaps[window - (start >> 6)] != 0:
                    return BAD_GAP
        elif at < end:
            return BAD_END
        _merge(exponents[: stop - first], rest[first:stop], out[first:stop])
    return OK
