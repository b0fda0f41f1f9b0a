"""Grid: what a calibrated rounding has to know of a format, and no more.

A format's decoder turns codes and scales into weights: weight = bf16(level * scale * factor), where the code names one
of a fixed set of levels and a scale belongs to a run of columns of a row. Rounding methods (calibrate/rounding.py)
choose levels; they never see codes, nibbles or file names. A codec gives its `Grid`: which levels there are, the final
scales of a weight (with everything that the file does to them, double quantisation included), and the stored parts.

Scales are searched here, for all formats: factors of the plain scale, least error weighted by what each column counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagel_compress.codecs.base import Chunk, Encoding

if TYPE_CHECKING:
    import torch

# Factors on the plain scale that a search tries, itself first: 0.65 to 1.05 in steps of 0.025.
FACTORS = (1.0, *(0.65 + 0.025 * step for step in range(17) if step != 14))
UNBOUNDED = 2.0**22  # of integer levels without ends: fp32 counts exactly, and rounding by a magic number works


@dataclass(frozen=True, slots=True)
class Levels:
    """The values that codes stand for, in units of the scale.

    One of three kinds. `table`: these values, ascending. `mantissa` above 0: floating point numbers of that many bits
    after the leading one, normal from `smallest` on, up to `high` on both sides (e4m3fn: 3, 2^-6, 448). Else all
    integers from `low` to `high`.
    """

    low: float = -UNBOUNDED
    high: float = UNBOUNDED
    table: tuple[float, ...] = ()
    mantissa: int = 0
    smallest: float = 0.0

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest level of each value, fp32; the upper of two in a table only above their midpoint."""
        import torch

        if self.table:
            table = torch.tensor(self.table, dtype=torch.float32, device=values.device)
            return table[torch.bucketize(values, (table[1:] + table[:-1]) / 2)]
        if not self.mantissa:
            return values.round().clamp(self.low, self.high)
        exponent = torch.frexp(values.abs().clamp(min=self.smallest))[1] - 1
        step = torch.ldexp(torch.ones_like(values), exponent - self.mantissa)
        return ((values / step).round() * step).clamp(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Curvature:
    """What an error in each column of a weight costs; (K,) fp32, in the order of the columns.

    `diagonal` is that of the second moments H of the layer's inputs: the cost where no other column helps.
    `conditional` is D of the factors H = (I + U) D (I + U)^T: the cost left when the columns that are rounded later
    make up for it.
    """

    diagonal: torch.Tensor
    conditional: torch.Tensor


@dataclass(frozen=True, slots=True)
class Scales:
    """A weight's scales: (N or 1, ceil(K / block)) fp32 values as decoding will read them, and the stored parts."""

    values: torch.Tensor
    stored: Mapping[str, torch.Tensor]


class Grid(ABC):
    """A format's levels and scales for one weight (N, K)."""

    levels: Levels
    block: int  # columns that share a scale: column j takes scale j // block of its row
    factor: float = 1.0  # what decoding multiplies level * scale with, apart
    note: str = ""  # what the manifest should say of the scales, once they are known

    @abstractmethod
    def scales(self, weights: torch.Tensor, curvature: Curvature) -> Scales:
        """Scales of (N, K) fp32 weights, final: with all roundings that the file puts them through."""

    @abstractmethod
    def pack(self, levels: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        """(N, K) fp32 levels and the scales that `scales` gave -> all stored parts by full name, contiguous, on CPU."""

    def retry(self, stored: Mapping[str, torch.Tensor]) -> Grid | None:
        """Another grid to round with instead, once the stored parts are known; None where they will do.

        For formats whose size depends on the levels.
        """
        return None

    def decode(self, levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(N, K) bf16: what the codec's `decode` gives for these levels and scales."""
        columns = levels.shape[1]
        return (levels * scales.repeat_interleave(self.block, 1)[:, :columns] * self.factor).bfloat16()


def searched(
    grid: Grid, weights: torch.Tensor, curvature: Curvature, plain: Callable[[float], torch.Tensor]
) -> torch.Tensor:
    """(N or 1, B) fp32: for each run of columns the scale of least weighted error among `plain(factor)` over FACTORS.

    `plain` gives the scales for a factor on the largest magnitude, rounded as the file rounds them.
    """
    import torch

    def error_of(scales: torch.Tensor) -> torch.Tensor:
        errors = block_errors(grid, weights, curvature.conditional, scales)
        return errors if len(scales) == len(errors) else errors.sum(0, keepdim=True)

    best = plain(FACTORS[0])
    least = error_of(best)
    for factor in FACTORS[1:]:
        tried = plain(factor)
        error = error_of(tried)
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best


def block_errors(grid: Grid, weights: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(N, B) fp32: sum over each run of columns of importance * (weight - nearest decoded)^2; `importance` is (K,)."""
    import torch

    from bagel_compress.codecs.kernels.grid_kernels import Arithmetic, errors_by_block
    from bagel_compress.codecs.kernels.threads import split

    if weights.device.type != "cpu":
        return error_of_blocks(grid, weights, importance, scales)
    out = torch.empty(weights.shape[0], scales.shape[1])
    arithmetic = Arithmetic.of(grid.levels, grid.factor)
    values, scale = weights.numpy(), scales.expand(weights.shape[0], -1).numpy()
    weight, found = importance.contiguous().numpy(), out.numpy()

    def part(a: int, b: int) -> None:
        errors_by_block(values[a:b], weight, scale[a:b], grid.block, *arithmetic, found[a:b])

    split(part, weights.shape[0], 1)
    return out


def error_of_blocks(grid: Grid, weights: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    import torch

    columns, blocks = weights.shape[1], scales.shape[1]
    wide = scales.repeat_interleave(grid.block, 1)[:, :columns]
    error = (weights - grid.decode(grid.levels.nearest(weights / wide / grid.factor), scales).float()).square()
    padded = torch.nn.functional.pad(error * importance, (0, blocks * grid.block - columns))
    return padded.unflatten(1, (blocks, grid.block)).sum(2)


@dataclass(slots=True)
class Packed(Encoding):
    """An encoding whose parts lie in memory: rounding needs the whole weight at once."""

    stored: Mapping[str, torch.Tensor] = None  # type: ignore[assignment]

    def chunks(self) -> Iterator[Chunk]:
        import torch

        for name, tensor in self.stored.items():
            yield Chunk(name, 0, tensor.reshape(-1).view(torch.uint8).numpy(), lasting=True)


def block_absmax(weights: torch.Tensor, block: int) -> torch.Tensor:
    """(N, K) -> (N, K / block): largest magnitudes of whole blocks."""
    return weights.unflatten(1, (-1, block)).abs().amax(2)
