"""Nearest levels of a grid, on runs of values: the inner step of scale searches and of calibrated rounding.

A run is worked on step by step with plain loops over its values, so that every loop runs in vector registers. A run's
scales are an array as long as the run. What comes back is the level, in units of the scale, and the value that decoding
gives for it, rounded to bf16 as every decoder here does. `Levels.nearest` says the same in torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np

from bagel_compress.codecs.kernels.bf16_kernels import bf16_rounded

if TYPE_CHECKING:
    from bagel_compress.codecs.grid import Levels

INTEGERS, TABLE, FLOATS = 0, 1, 2
RUN = 64  # values worked on at once
ROUND_MAGIC = np.float32(1.5 * 2**23)  # adding and subtracting it rounds to integers, to nearest even

_strict = numba.njit(nogil=True, cache=True, error_model="numpy")  # a scale of 0 divides as in IEEE arithmetic
_inlined = numba.njit(nogil=True, inline="always")


class Arithmetic(NamedTuple):
    """A grid's levels as the kernels take them."""

    kind: int
    table: np.ndarray  # INTEGERS: low, high; TABLE: levels; FLOATS: bits after the leading one, smallest normal, high
    factor: np.float32

    @classmethod
    def of(cls, levels: Levels, factor: float) -> Arithmetic:
        if levels.table:
            kind, table = TABLE, list(levels.table)
        elif levels.mantissa:
            kind, table = FLOATS, [levels.mantissa, levels.smallest, levels.high]
        else:
            kind, table = INTEGERS, [levels.low, levels.high]
        return cls(kind, np.array(table, np.float32), np.float32(factor))


@_strict
def errors_by_block(weights, importance, scales, block, kind, table, factor, out):  # type: ignore[no-untyped-def]
    """weights (N, K), importance (K,), scales (N, B) -> out (N, B): weighted squared errors, column j in j // block."""
    rows, columns = weights.shape
    scale, levels, values = np.empty(RUN, np.float32), np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    for r in range(rows):
        for b in range(scales.shape[1]):
            total = np.float32(0)
            last = min((b + 1) * block, columns)
            scale[:] = scales[r, b]
            for first in range(b * block, last, RUN):
                run = min(RUN, last - first)
                x = weights[r, first : first + run]
                nearest(x, scale, kind, table, factor, levels, values)
                weight = importance[first : first + run]
                for i in range(run):
                    e = x[i] - values[i]
                    total += weight[i] * e * e
            out[r, b] = total


@_strict
def nearest(x, scale, kind, table, factor, levels, values):  # type: ignore[no-untyped-def]
    """Values x (n,) with n scales -> their nearest levels and decoded values, into the first n of the outputs."""
    n = x.shape[0]
    for i in range(n):
        values[i] = x[i] / (scale[i] * factor)
    if kind == INTEGERS:
        low, high = table[0], table[1]
        for i in range(n):
            v = min(max(values[i], low), high)
            levels[i] = (v + ROUND_MAGIC) - ROUND_MAGIC
    elif kind == TABLE:
        levels[:n] = table[0]
        for k in range(1, table.shape[0]):
            level, middle = table[k], (table[k] + table[k - 1]) / np.float32(2)
            for i in range(n):
                levels[i] = level if values[i] > middle else levels[i]
    else:
        _floats(values, n, table, levels)
    decoded(levels, scale, factor, n, values)


@_strict
def decoded(levels, scale, factor, n, values):  # type: ignore[no-untyped-def]
    """bf16(level * scale * factor) of the first n, in this order of products."""
    for i in range(n):
        values[i] = bf16_rounded(np.float32(np.float32(levels[i] * scale[i]) * factor))


@_inlined
def _floats(values, n, table, levels):  # type: ignore[no-untyped-def]
    shift = np.int32(23) - np.int32(table[0])
    smallest, high = table[1], table[2]
    for i in range(n):
        size = abs(values[i])
        bits = np.float32(max(size, smallest)).view(np.int32)
        # 1.5 * 2^23 of the last place's steps, so that the sum's last place is one step
        magic = np.int32((bits & np.int32(0x7F800000)) + np.int32((shift << 23) | 0x400000)).view(np.float32)
        level = min((size + magic) - magic, high)
        levels[i] = np.copysign(level, values[i])
