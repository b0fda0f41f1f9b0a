"""Rounding with error feedback and coordinate descent: one implementation for every format's grid.

With H the second moments of a layer's inputs and E the error of its decoded weight, the squared error of the layer's
output is tr(E H E^T), row by row. With H = (I + U) D (I + U)^T, U strictly upper, it is the sum over columns of

    D_k (w_k + sum over j < k of e_j U_jk - decoded_k)^2

so rounding column after column to the nearest level of the bracket's first two terms is the greedy minimum: GPTQ, in
the form that needs one Cholesky factor and no inverse (Chee et al., arXiv 2307.13304, show that both are one). The
order of columns is the moments' diagonal, falling (act-order); scales were fixed before, so they stay in place (static
blocks). Coordinate descent then goes over the columns again and moves a code only where the error falls.

Rows for which feedback ends worse than rounding each weight alone keep the latter, so no row is ever worse for it.
Matrix products run where the moments lie; so do the column loops, as kernels on a CPU and in torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bagel_compress.calibrate import loops
from bagel_compress.calibrate.factor import Factor
from bagel_compress.calibrate.moments import MomentBlock, Moments
from bagel_compress.codecs.base import Encoding, Reader, Rounded, Unit, dtype_code
from bagel_compress.codecs.calibrated import CalibratedCodec, Gptq
from bagel_compress.codecs.grid import Curvature, Grid, Packed, Scales
from bagel_compress.codecs.matrix import not_finite, self_check
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 128  # columns whose errors are fed back one by one; those of whole blocks go through matrix products
WIDE = 512  # columns whose products with all others are made at once: 1.6 times as fast as COLUMNS with MKL on AVX2
READ_ELEMENTS = 1 << 22  # read from the source at a time


def round_unit(codec: CalibratedCodec, unit: Unit, source: Reader, moments: Moments) -> Encoding:
    """Codes one weight with the codec's rounding; where the codec has no grid for it, as without moments.

    Raises CalibrationError if the moments cannot steer a rounding, CodecError for weights that are not finite.
    """
    (spec,) = unit.specs
    grid = codec.grid(spec)
    if not isinstance(codec.rounding, Gptq):
        return codec.begin(unit, source)
    if grid is None:
        encoding = codec.begin(unit, source)
        encoding.reason = f"rounded to nearest: rows of {spec.shape[1]} weights are no whole blocks of {codec.format}"
        return encoding
    moments.check(spec.name)
    weights = read_weights(codec, spec, source).to(moments.diagonal().device)
    levels, scales, report = round_weights(grid, weights, moments, codec.rounding)
    stored = grid.pack(levels, scales)
    while (other := grid.retry(stored)) is not None:
        grid = other
        levels, scales, report = round_weights(grid, weights, moments, codec.rounding)
        stored = grid.pack(levels, scales)
    expected = grid.decode(levels, scales.values)
    found = codec.decode(unit, stored)[spec.name].to(expected.device)
    self_check(spec, codec, torch.equal(found, expected))
    parts = codec.parts(unit) if codec.exact else {n: _spec_of(part) for n, part in stored.items()}
    packed = Packed(codec=codec, parts=parts, reason=grid.note, stored=stored, rounded=report)
    packed.quality.add(_energy(weights), _energy(weights - found.float()))
    return packed


def _spec_of(part: Tensor) -> PartSpec:
    return PartSpec(dtype_code(part.dtype), tuple(part.shape))


def read_weights(codec: CalibratedCodec, spec: TensorSpec, source: Reader) -> Tensor:
    """(N, K) fp32. Raises CodecError on NaN and Inf."""
    weights = torch.empty(spec.numel)
    for start in range(0, spec.numel, READ_ELEMENTS):
        stop = min(start + READ_ELEMENTS, spec.numel)
        weights[start:stop] = source.read(spec, start, stop)
    if not bool(torch.isfinite(weights).all()):
        raise not_finite(spec, codec)
    return weights.reshape(spec.shape)


def round_weights(grid: Grid, weights: Tensor, moments: Moments, method: Gptq) -> tuple[Tensor, Scales, Rounded]:
    """(N, K) fp32 weights -> levels (N, K) fp32, scales as the grid gives them, and what it cost.

    The scales are made for the weights, the levels for the weights after `refit`.
    """
    blocks = moments.blocks()
    factors = moments.factors(method.damping, method.act_order)
    refits = moments.refits(method.damping, method.act_order) if method.refit else [None] * len(blocks)
    curvature = Curvature(moments.diagonal(), torch.cat([f.conditional[f.order.argsort()] for f in factors]))
    scales = grid.scales(weights, curvature)
    levels = torch.empty_like(weights)
    total = _Total()
    for block, factor, refit in zip(blocks, factors, refits, strict=True):
        columns = slice(block.start, block.stop)
        own = _Columns(grid, weights[:, columns], scales.values, block, factor, refit)
        levels[:, columns] = own.rounded(method.passes, total)
    report = Rounded(
        method=method.method,
        rows=moments.rows,
        damping=max(f.damping for f in factors),
        error=total.error / total.signal if total.signal else 0.0,
        nearest=total.nearest / total.signal if total.signal else 0.0,
        predictor=float((curvature.conditional.sum() / curvature.diagonal.sum()).sqrt()),
    )
    return levels, scales, report


@dataclass(slots=True)
class _Total:
    """Sums over the blocks of a weight; see `Rounded`."""

    signal: float = 0.0
    nearest: float = 0.0
    error: float = 0.0


class _Columns:
    """The columns of one block of moments, in the order in which they are rounded; column-major throughout."""

    def __init__(
        self, grid: Grid, weights: Tensor, scales: Tensor, block: MomentBlock, factor: Factor, refit: Tensor | None
    ) -> None:
        """`refit`: what `refit_map` gives for the block, None to round the weights as they are."""
        self.grid, self.weights, self.factor, self.refit = grid, weights, factor, refit
        self.scale_of = (block.start + factor.order) // grid.block  # (B,)
        self.scales = scales.expand(weights.shape[0], -1).T  # (scales, N)

    def rounded(self, passes: int, total: _Total) -> Tensor:
        """(N, B) levels after feedback and so many rounds of coordinate descent."""
        factor = self.factor
        values = self.weights.T[factor.order].contiguous() if self.refit is None else self.refit @ self.weights.T
        plain, plain_errors = self._nearest(values)
        plain_loss = self._loss(plain_errors)
        levels, errors, loss, mixed = self._feedback(values)
        worse = plain_loss < loss
        levels[:, worse], errors[:, worse], loss[worse] = plain[:, worse], plain_errors[:, worse], plain_loss[worse]
        del plain, plain_errors
        if passes:
            gradients = self._gradients(mixed)
            if bool(worse.any()):
                gradients[:, worse] = factor.moments @ errors[:, worse]
            scales = self.scales.contiguous()
            loops.descend(self.grid, gradients, scales, self.scale_of, factor.moments, passes, levels, errors, loss)
        added = factor.added
        total.signal += float((self._loss(values) - added * values.square().sum(0)).double().sum())
        total.nearest += float(plain_loss.double().sum())
        total.error += float((loss - added * errors.square().sum(0)).double().sum())
        out = torch.empty_like(levels)
        out[factor.order] = levels
        return out.T

    def _nearest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Levels of values rounded alone, and the errors of the decoded."""
        levels, errors = torch.empty_like(values), values.clone()
        for a in range(0, len(values), COLUMNS):
            part = slice(a, a + COLUMNS)
            scales = self._scales(part)
            loops.nearest(self.grid, values[part], scales, levels[part], errors[part])
        return levels, errors

    def _loss(self, errors: Tensor) -> Tensor:
        """(N,) sum over columns of D ((I + U)^T e)^2: each row's e H e^T, damping included."""
        loss = errors.new_zeros(errors.shape[1])
        for a in range(0, len(errors), WIDE):
            b = min(a + WIDE, len(errors))
            mixed = self.factor.unit[:b, a:b].T @ errors[:b]
            loss += (mixed.square_() * self.factor.conditional[a:b, None]).sum(0)
        return loss

    def _scales(self, part: slice) -> Tensor:
        return self.scales[self.scale_of[part]].contiguous()

    def _feedback(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Levels, errors E of the decoded, losses (N,) and D (I + U)^T E^T after rounding column by column."""
        levels, errors, loss = torch.empty_like(values), values.clone(), values.new_zeros(values.shape[1])
        unit, mixed = self.factor.unit, torch.empty_like(values)
        for wide, parts in _blocks(len(values)):
            a = wide.start
            torch.addmm(values[wide], unit[:a, wide].T, errors[:a], out=mixed[wide])
            for part in parts:
                mixed[part].addmm_(unit[a : part.start, part].T, errors[a : part.start])
                loops.feedback(
                    self.grid, mixed[part], errors[part], self._scales(part), unit[part, part].contiguous(),
                    self.factor.conditional[part], levels[part], loss,
                )  # fmt: skip
        return levels, errors, loss, mixed

    def _gradients(self, mixed: Tensor) -> Tensor:
        """(E H)^T of what feedback leaves, in its place: H = (I + U) D (I + U)^T."""
        for wide, _ in _blocks(len(mixed)):
            mixed[wide] = self.factor.unit[wide, wide.start :] @ mixed[wide.start :]
        return mixed


def _blocks(columns: int) -> Iterator[tuple[slice, list[slice]]]:
    """Runs of WIDE columns, each with its runs of COLUMNS."""
    for first in range(0, columns, WIDE):
        last = min(first + WIDE, columns)
        yield slice(first, last), [slice(a, min(a + COLUMNS, last)) for a in range(first, last, COLUMNS)]


def _energy(values: Tensor) -> float:
    return float(values.square().sum(1).double().sum())
