"""The loops of `bagel/one_row.py`, compiled by numba at their first use and kept on disk.

Entry points take addresses (`Tensor.data_ptr()`), since to make an array of numpy from a tensor takes longer than a
norm. The caller keeps the tensors alive, contiguous and of the sizes that it says.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,operator,call-arg"
# (numba types these functions itself)

from __future__ import annotations

import numba
import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

QUIET_NAN = np.uint16(0x7FC0)

_entry = numba.njit(nogil=True, cache=True)
_sums = numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})


@_entry
def rows_fp32(weight, x, bias, y, rows, columns, start, stop):
    """`_four_streams` of fp32 numbers at these addresses; bias 0: none."""
    arrays = (
        carray(_pointer(weight), (rows, columns), np.float32),
        carray(_pointer(x), (columns,), np.float32),
        carray(_pointer(bias), (rows if bias else 0,), np.float32),
        carray(_pointer(y), (rows,), np.float32),
    )
    _four_streams(*arrays, start, stop)


@_entry
def rows_bf16(weight, x, bias, y, rows, columns, start, stop):
    """`_four_streams` of bf16 numbers at these addresses; bias 0: none."""
    arrays = (
        carray(_pointer(weight), (rows, columns), np.uint16),
        carray(_pointer(x), (columns,), np.uint16),
        carray(_pointer(bias), (rows if bias else 0,), np.uint16),
        carray(_pointer(y), (rows,), np.uint16),
    )
    _four_streams(*arrays, start, stop)


@_entry
def norm_fp32(x, weight, y, rows, columns, eps):
    """`_normalised` of fp32 numbers at these addresses."""
    shape = (rows, columns)
    weights = carray(_pointer(weight), (columns,), np.float32)
    _normalised(
        carray(_pointer(x), shape, np.float32), weights, np.float32(eps), carray(_pointer(y), shape, np.float32)
    )


@_entry
def norm_bf16(x, weight, y, rows, columns, eps):
    """`_normalised` of bf16 numbers at these addresses."""
    shape = (rows, columns)
    weights = carray(_pointer(weight), (columns,), np.uint16)
    _normalised(carray(_pointer(x), shape, np.uint16), weights, np.float32(eps), carray(_pointer(y), shape, np.uint16))


@intrinsic
def _pointer(typing, address):
    """The pointer of an address."""

    def emit(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.uintp), emit


@_sums
def _four_streams(weight, x, bias, y, start, stop):
    """y = weight @ x + bias for the rows start..stop of each quarter of the weight's rows.

    weight (R, C), x (C,), y (R,) and bias (R,) or (0,), none: all fp32, or all uint16 words of bf16. Start and stop
    count rows of a quarter, of R // 4 rows; whoever has the last of them takes the R % 4 rows left over at the end too.
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


@_sums
def _put(y, bias, i, value):
    _store(y, i, value + _wide(bias[i]) if bias.shape[0] else value)


@_sums
def _normalised(x, weight, eps, y):
    """RMSNorm of every row of x (R, C) into y (R, C), by weight (C,): all fp32, or all words of bf16; eps fp32.

    The row is normalised in fp32, rounded, multiplied and rounded again.
    """
    rows, columns = x.shape
    for r in range(rows):
        squares = np.float32(0)
        for j in range(columns):
            squares += _wide(x[r, j]) * _wide(x[r, j])
        scale = np.float32(1) / np.sqrt(squares / np.float32(columns) + eps)
        for j in range(columns):
            _store(y[r], j, _wide(x[r, j]) * scale)
        for j in range(columns):
            _store(y[r], j, _wide(y[r, j]) * _wide(weight[j]))


def _wide(number):
    """fp32 of a stored number: an fp32, or the 16-bit word of a bf16."""


@overload(_wide)
def _wide_of(number):
    if isinstance(number, types.Float):
        return lambda number: number
    return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)


def _store(y, i, value):
    """y[i] = value, an fp32; rounded to the nearest bf16, ties to even, where y holds words."""


@overload(_store)
def _store_of(y, i, value):
    if isinstance(y.dtype, types.Float):

        def as_it_is(y, i, value):
            y[i] = value

        return as_it_is

    def rounded(y, i, value):
        bits = np.float32(value).view(np.uint32)
        up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        y[i] = QUIET_NAN if np.isnan(value) else np.uint16(np.uint32(bits + up) >> np.uint32(16))

    return rounded
