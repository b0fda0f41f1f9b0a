"""Moments: the second moments of the inputs of a linear layer, which say what a rounding error costs.

H = sum over rows of x x^T, in fp32 (in bf16 its factors do not exist). For wide inputs H is kept as blocks along its
diagonal: the other products are taken to be zero, which costs little where the blocks are hundreds of columns wide and
saves most of the memory and work. H is symmetric: only the panels on and above the diagonal are multiplied, and the
rest is mirrored when H is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from bagel_compress.calibrate.factor import Factor, factorise, refit_map
from bagel_compress.errors import CalibrationError

if TYPE_CHECKING:
    import torch

WIDEST = 8192  # widest inputs whose moments are kept whole: 268 MB in fp32
BLOCK = 1024  # width of the blocks along the diagonal for wider ones
LEAST_ROWS = 4  # rows must be at least the width of a block of moments over this
PANEL = 512  # columns of H that one product gives; narrower ones waste less on the mirrored half and run slower


def block_width(width: int) -> int:
    """Width of the blocks of moments that a build keeps for inputs of `width`."""
    return width if width <= WIDEST else BLOCK


def least_rows(width: int) -> int:
    """Rows of inputs that moments in blocks of `width` need at least."""
    return -(-width // LEAST_ROWS)


class MomentBlock(NamedTuple):
    """A range of columns and the moments among them, in fp32."""

    start: int
    stop: int
    h: torch.Tensor  # (stop - start, stop - start)
    cross: torch.Tensor | None  # X_full^T X_quantised of the same columns, if it was asked for


class Moments:
    """Second moments of the inputs (R, width) of one linear layer, or of several that see the same inputs."""

    def __init__(
        self, width: int, *, block: int | None = None, cross: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        """Zero moments. `block`: width of the blocks along the diagonal, None for one; the last may be narrower."""
        import torch

        self.width, self.rows = width, 0
        step = block or width
        ranges = [(a, min(a + step, width)) for a in range(0, width, step)]
        self._ranges = ranges
        self._h = [torch.zeros(b - a, b - a, device=device) for a, b in ranges]
        self._cross = [torch.zeros(b - a, b - a, device=device) for a, b in ranges] if cross else None
        self._first: torch.Tensor | None = None
        self._varied = False
        self._mirrored = True
        self._factors: dict[tuple[float, bool], list[Factor]] = {}
        self._refits: dict[tuple[float, bool], list[torch.Tensor | None]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all moments."""
        return sum(h.nbytes for h in self._h) * (1 if self._cross is None else 2)

    def add(self, inputs: torch.Tensor, full: torch.Tensor | None = None) -> None:
        """Adds rows (R, width) of any float dtype. `full`: the same rows as the full-precision model has them, needed
        exactly if the moments were made with `cross`."""
        rows = inputs.reshape(-1, self.width).float()
        if (full is None) != (self._cross is None):
            raise ValueError("full rows go with moments that keep cross products, and only with them")
        if rows.shape[0] == 0:
            return
        if self._first is None:
            self._first = rows[0].clone()
        self._varied = self._varied or bool((rows != self._first).any())
        self.rows += rows.shape[0]
        for index, (a, b) in enumerate(self._ranges):
            _add_upper(self._h[index], rows[:, a:b])
            if self._cross is not None and full is not None:
                self._cross[index].addmm_(full.reshape(-1, self.width)[:, a:b].float().T, rows[:, a:b])
        self._mirrored = False
        self.forget_factors()

    def blocks(self) -> list[MomentBlock]:
        """The blocks along the diagonal, in order of their columns."""
        if not self._mirrored:
            for h in self._h:
                _mirror(h)
            self._mirrored = True
        crosses: Sequence[torch.Tensor | None] = self._cross or [None] * len(self._h)
        return [MomentBlock(a, b, h, c) for (a, b), h, c in zip(self._ranges, self._h, crosses, strict=True)]

    def factors(self, damping: float, act_order: bool) -> list[Factor]:
        """Factors of the blocks, kept for the next weight that sees the same inputs."""
        key = (damping, act_order)
        if key not in self._factors:
            self._factors = {key: [factorise(block.h, damping, act_order) for block in self.blocks()]}
        return self._factors[key]

    def refits(self, damping: float, act_order: bool) -> Sequence[torch.Tensor | None]:
        """`refit_map` of each block, kept like the factors; None for moments without cross products."""
        key = (damping, act_order)
        if key not in self._refits:
            pairs = zip(self.blocks(), self.factors(damping, act_order), strict=True)
            self._refits = {key: [None if b.cross is None else refit_map(b.h, b.cross, f) for b, f in pairs]}
        return self._refits[key]

    def forget_factors(self) -> None:
        """Frees the factors and refits that are kept."""
        self._factors, self._refits = {}, {}

    def diagonal(self) -> torch.Tensor:
        """(width,) fp32: the diagonal of H."""
        import torch

        return torch.cat([h.diagonal() for h in self._h])

    def check(self, name: str) -> None:
        """Raises CalibrationError if these moments, of the inputs of `name`, cannot steer a rounding."""
        import torch

        width = max(b - a for a, b in self._ranges)
        least = least_rows(width)
        if self.rows < least:
            raise CalibrationError(
                f"{name}: the calibration set gave {self.rows} rows of inputs for moments of a width of {width}, at"
                f" least {least} are needed; add turns or pictures worth {least - self.rows} more rows."
            )
        if not all(bool(torch.isfinite(h).all()) for h in self._h):
            raise CalibrationError(
                f"{name}: the second moments of its inputs hold NaN or Inf; the calibration set or the checkpoint is"
                " damaged, make the set again and verify the checkpoint."
            )
        if not self._varied:
            raise CalibrationError(
                f"{name}: all {self.rows} rows of inputs that the calibration set gave are equal; give one whose turns"
                " and pictures differ."
            )


def _add_upper(h: torch.Tensor, rows: torch.Tensor) -> None:
    """h += rows^T rows, on and above the diagonal, panel by panel."""
    for a in range(0, h.shape[0], PANEL):
        panel = slice(a, min(a + PANEL, h.shape[0]))
        h[panel, a:].addmm_(rows[:, panel].T, rows[:, a:])


def _mirror(h: torch.Tensor) -> None:
    """Copies what is above the diagonal below it."""
    for a in range(0, h.shape[0], PANEL):
        b = min(a + PANEL, h.shape[0])
        h[b:, a:b] = h[a:b, b:].T
        square = h[a:b, a:b]
        square.copy_(square.triu() + square.triu(1).T)
