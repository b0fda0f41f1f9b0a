"""The column loops of calibrated rounding: kernels on a CPU, torch elsewhere. Shapes as in rounding_kernels.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bagel_compress.codecs.grid import Grid

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128  # columns that descend one by one in torch, before all gradients learn of it
GRAIN = 64  # rows of a weight that a thread takes at least: one run of the kernels


def feedback(
    grid: Grid,
    targets: Tensor,
    errors: Tensor,
    scales: Tensor,
    factors: Tensor,
    weight: Tensor,
    levels: Tensor,
    loss: Tensor,
) -> None:
    """Rounds the columns of a block one after the other; `targets` to `loss` are changed in place, see the kernel."""
    from bagel_compress.calibrate import rounding_kernels
    from bagel_compress.codecs.kernels.grid_kernels import Arithmetic
    from bagel_compress.codecs.kernels.threads import split

    if not on_cpu(targets):
        _feedback(grid, targets, errors, scales, factors, weight, levels, loss)
        return
    arithmetic = Arithmetic.of(grid.levels, grid.factor)
    t, e, s, f = targets.numpy(), errors.numpy(), scales.numpy(), factors.numpy()
    w, c, total = weight.numpy(), levels.numpy(), loss.numpy()

    def part(a: int, b: int) -> None:
        rounding_kernels.feedback(t, e, s, f, w, *arithmetic, c, total, a, b)

    split(part, targets.shape[1], GRAIN)


def descend(
    grid: Grid,
    gradients: Tensor,
    scales: Tensor,
    scale_of: Tensor,
    moments: Tensor,
    passes: int,
    levels: Tensor,
    errors: Tensor,
    loss: Tensor,
) -> None:
    """Rounds of coordinate descent over all columns; `errors`, `levels` and `loss` are changed in place.

    `gradients` are of no meaning afterwards.
    """
    from bagel_compress.calibrate import rounding_kernels
    from bagel_compress.codecs.kernels.grid_kernels import Arithmetic
    from bagel_compress.codecs.kernels.threads import split

    if not on_cpu(gradients):
        for _ in range(passes):
            _descend(grid, gradients, scales, scale_of, moments, levels, errors, loss)
        return
    arithmetic = Arithmetic.of(grid.levels, grid.factor)
    g, s, of, h = gradients.numpy(), scales.numpy(), scale_of.numpy(), moments.numpy()
    c, e, total = levels.numpy(), errors.numpy(), loss.numpy()

    def part(a: int, b: int) -> None:
        rounding_kernels.descend(g, s, of, h, passes, *arithmetic, c, e, total, a, b)

    split(part, gradients.shape[1], GRAIN)


def nearest(grid: Grid, values: Tensor, scales: Tensor, levels: Tensor, errors: Tensor) -> None:
    """Rounds (B, N) values each alone: into `levels`, and the errors of what decoding gives into `errors`."""
    from bagel_compress.calibrate import rounding_kernels
    from bagel_compress.codecs.kernels.grid_kernels import Arithmetic
    from bagel_compress.codecs.kernels.threads import split

    if not on_cpu(values):
        levels.copy_(grid.levels.nearest(values / scales / grid.factor))
        torch.sub(values, value(grid, levels, scales), out=errors)
        return
    arithmetic = Arithmetic.of(grid.levels, grid.factor)
    x, s, c, e = values.numpy(), scales.numpy(), levels.numpy(), errors.numpy()
    split(lambda a, b: rounding_kernels.alone(x, s, *arithmetic, c, e, a, b), values.shape[1], GRAIN)


def _feedback(
    grid: Grid,
    targets: Tensor,
    errors: Tensor,
    scales: Tensor,
    factors: Tensor,
    weight: Tensor,
    levels: Tensor,
    loss: Tensor,
) -> None:
    for j in range(len(targets)):
        levels[j] = grid.levels.nearest(targets[j] / scales[j] / grid.factor)
        found = value(grid, levels[j], scales[j])
        loss += weight[j] * (targets[j] - found).square()
        errors[j] -= found
        targets[j + 1 :].addr_(factors[j, j + 1 :], errors[j])
        targets[j].sub_(found).mul_(weight[j])


def _descend(
    grid: Grid,
    gradients: Tensor,
    scales: Tensor,
    scale_of: Tensor,
    moments: Tensor,
    levels: Tensor,
    errors: Tensor,
    loss: Tensor,
) -> None:
    for first in range(0, len(gradients), BLOCK):
        part = slice(first, min(first + BLOCK, len(gradients)))
        before, among = errors[part].clone(), moments[part, part]
        own, scale = gradients[part].clone(), scales[scale_of[part]]
        for j, row in enumerate(range(part.start, part.stop)):
            old, cost = value(grid, levels[row], scale[j]), among[j, j]
            level = grid.levels.nearest((old + own[j] / cost) / scale[j] / grid.factor)
            change = old - value(grid, level, scale[j])
            gained = change * (2 * own[j] + change * cost)
            better = gained < 0
            levels[row] = level.where(better, levels[row])
            change = change.where(better, change.new_zeros(()))
            errors[row] += change
            loss += gained.clamp(max=0)
            own[j + 1 :].addr_(among[j, j + 1 :], change)
        gradients.addmm_(moments[:, part], errors[part] - before)


def on_cpu(tensor: Tensor) -> bool:
    """Do the kernels run where this tensor lies?"""
    return tensor.device.type == "cpu"


def value(grid: Grid, levels: Tensor, scales: Tensor) -> Tensor:
    """fp32 values of what decoding gives."""
    return (levels * scales * grid.factor).bfloat16().float()
