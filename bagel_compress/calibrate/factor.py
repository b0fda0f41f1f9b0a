"""Factor: second moments in rounding order, and their factors H = (I + U) D (I + U)^T."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bagel_compress.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

GROWTH = 4.0  # of the damping, each time that the factors do not exist
MOST = 1.0  # damping, in units of the mean diagonal, at which moments are given up


@dataclass(frozen=True, slots=True)
class Factor:
    """Damped moments (K, K) fp32, columns in the order in which they are rounded."""

    order: Tensor  # (K,) int64: which column comes when
    moments: Tensor  # H + added, in order
    unit: Tensor  # I + U, in order
    conditional: Tensor  # (K,) D, in order
    damping: float  # what was added, in units of the mean diagonal
    added: float  # the same in units of H

    def solve(self, right: Tensor) -> Tensor:
        """(H + added)^-1 right, for `right` (K, M) with rows in the columns' own order."""
        within = right[self.order]
        half = torch.linalg.solve_triangular(self.unit, within, upper=True, unitriangular=True)
        half /= self.conditional[:, None]
        whole = torch.linalg.solve_triangular(self.unit.T, half, upper=False, unitriangular=True)
        out = torch.empty_like(whole)
        out[self.order] = whole
        return out


def factorise(h: Tensor, damping: float, act_order: bool) -> Factor:
    """Factors of h + damping * mean(diagonal) * I; the damping grows until they exist.

    Raises CalibrationError if they do not at the largest.
    """
    diagonal = h.diagonal()
    columns = torch.arange(len(h), device=h.device)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else columns
    mean = float(diagonal.double().mean())
    moments = h[order][:, order]
    while damping <= MOST:
        added = damping * mean if mean > 0 else 1.0
        moments.diagonal().copy_(diagonal[order]).add_(added)
        lower, failed = torch.linalg.cholesky_ex(moments.flip(0, 1))
        if not int(failed):
            root = lower.flip(0, 1)  # upper; moments = root root^T
            scale = root.diagonal().clone()
            return Factor(order, moments, root.div_(scale), scale.square(), damping, added)
        damping *= GROWTH
    raise CalibrationError(
        f"second moments of {len(h)} inputs have no Cholesky factor even with {MOST:g} of their mean diagonal added;"
        " the calibration set or the checkpoint is damaged, make the set again."
    )


def refit_map(h: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """(K, K) fp32, rows in rounding order, such that `refit_map @ W^T` are the refitted weights' columns in that order.

    Inputs of a layer whose predecessors were rounded differ from the full model's. With C = X_full^T X_rounded and
    H = X_rounded^T X_rounded, W + W (C - H) (H + damping)^-1 is the least squares fit of the full layer's output.
    """
    moved = factor.solve((cross - h).T)
    moved.diagonal().add_(1)
    return moved[factor.order]
