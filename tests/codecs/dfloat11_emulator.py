"""The official DF11 decode kernel, thread by thread, on a CPU: what a GPU would do with a unit's tensors.

Written from the format's description and the kernel's behaviour; shares nothing with the decoder under test. A thread
holds 12 bytes, skips its 5-bit gap, and decodes by up to four table levels until 64 bits are used, first only counting,
then (after a scan over the block) writing. What would hang or crash a GPU raises here: a code length of 0, shared
memory over 48 KiB, a write outside the block's buffer.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numba import njit

OK, HANGS, OUT_OF_BOUNDS = 0, 1, 2
SHARED_MEMORY = 48 * 1024


class KernelError(Exception):
    """The GPU would hang, refuse the launch or write out of bounds."""


def launch(grid: int, threads: int, shared: int, args: list[int]) -> None:
    """Pointers to luts, stream, sign-mantissa, positions, gaps and output; rows, bytes, weights."""
    luts, stream, rest, positions, gaps, out, rows, stream_bytes, weights = args
    if shared > SHARED_MEMORY:
        raise KernelError(f"{shared} bytes of shared memory")
    status = _grid(
        grid,
        threads,
        (shared - 4 * threads - 4) // 2,
        _array(luts, rows * 256).reshape(rows, 256),
        _array(stream, stream_bytes),
        _array(rest, weights),
        _array(positions, 4 * (grid + 1)).view(np.uint32),
        _array(gaps, grid * threads * 5 // 8),
        _array(out, 2 * weights).view(np.uint16),
    )
    if status != OK:
        raise KernelError("never returns" if status == HANGS else "writes out of bounds")


def _array(pointer: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


@njit
def _grid(grid, threads, room, luts, stream, rest, positions, gaps, out):  # type: ignore[no-untyped-def]
    counts = np.zeros(threads, np.int64)
    for block in range(grid):
        for thread in range(threads):
            counts[thread] = _count(block * threads + thread, luts, stream, gaps)
            if counts[thread] < 0:
                return HANGS
        index = np.int64(positions[block])
        for thread in range(threads):
            stop = min(index + counts[thread], rest.size)
            if index < stop and stop - positions[block] > room:
                return OUT_OF_BOUNDS
            _write(block * threads + thread, index, stop, positions[block + 1], luts, stream, rest, gaps, out)
            index += counts[thread]
    return OK


@njit
def _byte(stream, at):  # type: ignore[no-untyped-def]
    return np.uint64(stream[at]) if at < stream.size else np.uint64(0)


@njit
def _gap(gaps, thread):  # type: ignore[no-untyped-def]
    at = thread * 5
    following = np.int64(gaps[at // 8 + 1]) if at // 8 + 1 < gaps.size else np.int64(0)
    pair = (np.int64(gaps[at // 8]) << 8) | following
    return (pair >> (11 - at % 8)) & 31


@njit
def _peek(stream, bit):  # type: ignore[no-untyped-def]
    """The 32 bits from `bit` on."""
    word = np.uint64(0)
    for k in range(5):
        word = (word << np.uint64(8)) | _byte(stream, bit // 8 + k)
    return (word >> np.uint64(8 - bit % 8)) & np.uint64(0xFFFFFFFF)


@njit
def _symbol(luts, bits):  # type: ignore[no-untyped-def]
    value = luts[0, bits >> np.uint64(24)]
    for level in range(1, 4):
        if value >= 240:
            value = luts[256 - np.int64(value), (bits >> np.uint64(24 - 8 * level)) & np.uint64(255)]
    return value


@njit
def _count(thread, luts, stream, gaps):  # type: ignore[no-untyped-def]
    used, count = _gap(gaps, thread), 0
    while used < 64:
        length = np.int64(luts[-1, _symbol(luts, _peek(stream, thread * 64 + used))])
        if length == 0:
            return -1
        used += length
        count += 1
    return count


@njit
def _write(thread, index, stop, limit, luts, stream, rest, gaps, out):  # type: ignore[no-untyped-def]
    used = _gap(gaps, thread)
    while index < stop:
        exponent = _symbol(luts, _peek(stream, thread * 64 + used))
        byte = np.uint16(rest[index])
        if index < limit:
            sign = (byte & np.uint16(0x80)) << np.uint16(8)
            out[index] = sign | (np.uint16(exponent) << np.uint16(7)) | (byte & np.uint16(0x7F))
        used += np.int64(luts[-1, exponent])
        index += 1
