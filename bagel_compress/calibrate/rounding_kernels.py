"""The two column loops of calibrated rounding, on the CPU. Everything is column-major: (columns, rows of the weight).

Columns are rounded one after the other, and what one leaves changes those after it; rows of the weight do not know of
each other. Feedback changes every column after each one, so a run of rows goes through the vector registers together.
Descent changes one code in a hundred, so each row is gone over by itself: its columns are tried in the registers, and
only a code that moves costs a pass over its gradients. Threads share the arrays: each takes the rows from `start` to
`stop`.
"""

from __future__ import annotations

import numba
import numpy as np

from bagel_compress.codecs.kernels.grid_kernels import RUN, decoded, nearest

TOGETHER = 8  # rows of a weight that descent copies at once, from column-major arrays

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

    targets (B, N): weights with what the blocks before fed back, turned into D * (target - decoded); errors (B, N):
    weights, turned into errors of the decoded values; scales (B, N); factors (B, B): U of H = (I + U) D (I + U)^T;
    weight (B,): D; levels (B, N) out; loss (N,) += D * (target - decoded)^2.
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
                targets[j, first + i] = weight[j] * left
                error[i] -= value[i]
            for k in range(j + 1, columns):
                u = factors[j, k]
                for i in range(n):
                    tile[k, i] += u * error[i]


@_strict
def descend(  # type: ignore[no-untyped-def]
    gradients, scales, scale_of, moments, passes, kind, table, factor, levels, errors, loss, start, stop
):
    """Rounds of coordinate descent over all B columns; a code of a row changes only if the row's loss falls.

    gradients (B, N): E H; scales (S, N), column j takes scale_of[j]; moments (B, B): H; levels and errors (B, N) in and
    out; loss (N,) += the change.
    """
    columns = gradients.shape[0]
    shape = (TOGETHER, columns)
    gradient, scale = np.empty(shape, np.float32), np.empty(shape, np.float32)
    level, error = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for first in range(start, stop, TOGETHER):
        n = min(TOGETHER, stop - first)
        for j in range(columns):
            for i in range(n):
                gradient[i, j], scale[i, j] = gradients[j, first + i], scales[scale_of[j], first + i]
                level[i, j], error[i, j] = levels[j, first + i], errors[j, first + i]
        for i in range(n):
            for _ in range(passes):
                gained = _descend_row(gradient[i], scale[i], moments, kind, table, factor, level[i], error[i])
                loss[first + i] += gained
                if gained == 0:
                    break
        for j in range(columns):
            for i in range(n):
                levels[j, first + i], errors[j, first + i] = level[i, j], error[i, j]


@_strict
def _descend_row(gradient, scale, moments, kind, table, factor, levels, errors):  # type: ignore[no-untyped-def]
    """One round over the columns of a row, whose gradients follow: the change of its loss."""
    columns, total = gradient.size, np.float32(0)
    x, change, gain = np.empty(RUN, np.float32), np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    value, level = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    for first in range(0, columns, RUN):
        at, last = first, min(first + RUN, columns)
        while at < last:
            n = last - at
            decoded(levels[at:last], scale[at:last], factor, n, change)
            for i in range(n):
                x[i] = change[i] + gradient[at + i] / moments[at + i, at + i]
            nearest(x[:n], scale[at:last], kind, table, factor, level, value)
            for i in range(n):
                change[i] -= value[i]
                gain[i] = change[i] * (np.float32(2) * gradient[at + i] + change[i] * moments[at + i, at + i])
            found = 0
            while found < n and not gain[found] < 0:
                found += 1
            if found == n:
                break
            j, moved = at + found, change[found]
            levels[j] = level[found]
            errors[j] += moved
            total += gain[found]
            row = moments[j]
            for k in range(columns):
                gradient[k] += row[k] * moved
            at = j + 1
    return total
