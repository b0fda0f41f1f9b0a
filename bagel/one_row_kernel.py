"""The loop of `bagel/one_row.py`, compiled by numba at its first use and kept on disk."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,operator"
# (numba types these functions itself)

from __future__ import annotations

import numba
import numpy as np
from numba.extending import overload

QUIET_NAN = np.uint16(0x7FC0)


def _wide(number):
    """fp32 of a stored number: an fp32, or the 16-bit word of a bf16."""


@overload(_wide)
def _wide_of(number):
    if isinstance(number, numba.types.Float):
        return lambda number: number
    return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)


def _store(y, i, value):
    """y[i] = value, an fp32; rounded to the nearest bf16, ties to even, where y holds words."""


@overload(_store)
def _store_of(y, i, value):
    if isinstance(y.dtype, numba.types.Float):

        def as_it_is(y, i, value):
            y[i] = value

        return as_it_is

    def rounded(y, i, value):
        bits = np.float32(value).view(np.uint32)
        up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        y[i] = QUIET_NAN if np.isnan(value) else np.uint16(np.uint32(bits + up) >> np.uint32(16))

    return rounded


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def four_streams(weight, x, bias, y, start, stop):
    """y = weight @ x + bias for the rows start..stop of each quarter of the weight's rows.

    weight (R, C), x (C,), y (R,) and bias (R,) or (0,), none: all fp32, or all uint16 words of bf16. Start and stop count
    rows of a quarter, of R // 4 rows; whoever has the last of them takes the R % 4 rows left over at the end as well.
    """
    rows, columns = weight.shape
    quarter = rows // 4
    wide = np.empty(columns, np.float32)
    for j in range(columns):
        wide[j] = _wide(x[j])
    for i in range(start, stop):
        a = b = c = d = np.float32(0)
        for j in range(columns):
            xj = wide[j]
            a += _wide(weight[i, j]) * xj
            b += _wide(weight[i + quarter, j]) * xj
            c += _wide(weight[i + 2 * quarter, j]) * xj
            d += _wide(weight[i + 3 * quarter, j]) * xj
        _put(y, bias, i, a)
        _put(y, bias, i + quarter, b)
        _put(y, bias, i + 2 * quarter, c)
        _put(y, bias, i + 3 * quarter, d)
    if stop == quarter:
        for i in range(4 * quarter, rows):
            a = np.float32(0)
            for j in range(columns):
                a += _wide(weight[i, j]) * wide[j]
            _put(y, bias, i, a)


@numba.njit(nogil=True)
def _put(y, bias, i, value):
    _store(y, i, value + _wide(bias[i]) if bias.shape[0] else value)
