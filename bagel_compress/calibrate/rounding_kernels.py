"""The two column loops of calibrated rounding, on the CPU. Everything is column-major: (columns, rows of the weight).

Columns of a block are rounded one after the other, and what one leaves changes those after it; rows of the weight do
not know of each other, so that a run of rows stays in the vector registers and in the first cache. Threads share the
arrays: each takes the rows from `start` to `stop`.
"""

from __future__ import annotations

import numba
import numpy as np

from bagel_compress.codecs.kernels.grid_kernels import RUN, decoded, nearest

_strict = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})


@_strict
def alone(weights, scales, kind, table, factor, levels, errors, start, stop):  # type: ignore[no-untyped-def]
    """weights and scales (B, N) -> levels and errors of the decoded values (B, N)."""
    value = np.empty(RUN, np.float32)
    for j in range(weights.shape[0]):
        for first in range(start, stop, RUN):
            last = min(first + RUN, stop)
            x, error = weights[j, first:last], errors[j, first:last]
            nearest(x, scales[j, first:last], kind, table, factor, levels[j, first:last], value)
            for i in range(last - first):
                error[i] = x[i] - value[i]


@_strict
def feedback(targets, errors, scales, factors, weight, kind, table, factor, levels, loss, start, stop):  # type: ignore[no-untyped-def]
    """Rounds a block of B columns, each with the errors of those before it.

    targets (B, N): weights with what the blocks before fed back; errors (B, N): weights, turned into errors of the
    decoded values; scales (B, N); factors (B, B): U of H = (I + U) D (I + U)^T; weight (B,): D; levels (B, N) out;
    loss (N,) += D * (target - decoded)^2.
    """
    columns = targets.shape[0]
    tile, value = np.empty((columns, RUN), np.float32), np.empty(RUN, np.float32)
    for first in range(start, stop, RUN):
        n = min(RUN, stop - first)
        for j in range(columns):
            for i in range(n):
                tile[j, i] = targets[j, first + i]
        for j in range(columns):
            nearest(tile[j, :n], scales[j, first : first + n], kind, table, factor, levels[j, first : first + n], value)
            error = errors[j, first : first + n]
            for i in range(n):
                left = tile[j, i] - value[i]
                loss[first + i] += weight[j] * left * left
                error[i] -= value[i]
            for k in range(j + 1, columns):
                u = factors[j, k]
                for i in range(n):
                    tile[k, i] += u * error[i]


@_strict
def descend(gradients, scales, moments, kind, table, factor, levels, errors, loss, start, stop):  # type: ignore[no-untyped-def]
    """One round of coordinate descent over a block of B columns; an error of a row changes only if its loss falls.

    gradients (B, N): (E H) of these columns; moments (B, B): H among them; levels and errors (B, N) in and out;
    loss (N,) += the change.
    """
    columns = gradients.shape[0]
    tile, x, value = np.empty((columns, RUN), np.float32), np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    level, change = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    for first in range(start, stop, RUN):
        n = min(RUN, stop - first)
        for j in range(columns):
            for i in range(n):
                tile[j, i] = gradients[j, first + i]
        for j in range(columns):
            scale, old = scales[j, first : first + n], levels[j, first : first + n]
            cost = moments[j, j]
            decoded(old, scale, factor, n, value)
            for i in range(n):
                change[i] = value[i]
                x[i] = value[i] + tile[j, i] / cost
            nearest(x[:n], scale, kind, table, factor, level, value)
            moved = False
            for i in range(n):
                d = change[i] - value[i]
                gained = d * (np.float32(2) * tile[j, i] + d * cost)
                better = gained < 0
                change[i] = d if better else np.float32(0)
                old[i] = level[i] if better else old[i]
                loss[first + i] += gained if better else np.float32(0)
                errors[j, first + i] += change[i]
                moved |= better
            if moved:
                for k in range(j + 1, columns):
                    h = moments[j, k]
                    for i in range(n):
                        tile[k, i] += h * change[i]
