"""The compiled inner loop of `synthetic`: counter-based normal numbers, scaled and rounded to bf16. Imports numba."""

from __future__ import annotations

import numba
import numpy as np

from bagel_compress.codecs.kernels.bf16_kernels import bf16_word

OUTLIER = 0.002  # share of outliers in matrices
OUTLIER_SIZE = np.float32(6.0)
_U = np.uint64


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _mix(x: np.uint64) -> np.uint64:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): a bijection whose output bits look independent."""
    x = (x ^ (x >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U(27))) * _U(0x94D049BB133111EB)
    return x ^ (x >> _U(31))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def fill(out, start, key, table, rows, scales, columns, centre, matrix) -> None:  # type: ignore[no-untyped-def]
    """Fills `out`, uint16 [n], with the bf16 bits of elements start, start + 1, ... of a tensor.

    table: float32 [4097], the inverse normal distribution; rows, scales: float32, a factor per row and per column.
    Each element has a 64-bit hash: 12 bits choose an interval of the table, 24 bits the position in it, 16 bits decide
    whether the element is an outlier.
    """
    threshold = _U(round(OUTLIER * 65536))
    row, column = start // columns, start % columns
    for i in range(out.size):
        h = _mix(_U(start + i) * _U(0x9E3779B97F4A7C15) + key)
        slot = np.int64(h >> _U(52))
        place = np.float32((h >> _U(28)) & _U(0xFFFFFF)) * np.float32(2.0**-24)
        value = table[slot] + place * (table[slot + 1] - table[slot])
        if matrix:
            value = value * rows[row] * scales[column]
            if (h & _U(0xFFFF)) < threshold:
                value = value * OUTLIER_SIZE
            column += 1
            if column == columns:
                column = 0
                row += 1
        else:
            value = centre + value * scales[0]
        out[i] = bf16_word(value)
