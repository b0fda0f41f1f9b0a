"""Calibrated rounding on ecq's grid: integers without ends, one step for all columns or one for each.

The step decides the rate and is only known to meet it when the levels are chosen, so a weight is rounded a few times:
with the step that rounding to nearest would take, then with one moved by what the rate was off, a bit per octave at
first, later by the line through the last two tries. Column steps are proportional to 1 / sqrt(D), D of Curvature, as
in WaterSIC (arXiv 2603.04956): a column whose errors the later ones cannot make up for gets a finer step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bagel_compress.codecs.ecq import pack
from bagel_compress.codecs.ecq.book import Book, fit
from bagel_compress.codecs.ecq.encode import BATCH, Workspace, margin
from bagel_compress.codecs.ecq.layout import COLUMN_STEPS, ESCAPE, MAX_LOW_BITS, RUN, Sizes
from bagel_compress.codecs.ecq.step import PLANE_GAIN, STEPS_PER_OCTAVE, Search, index_of, step_at, symbols_of
from bagel_compress.codecs.grid import UNBOUNDED, Curvature, Grid, Levels, Scales
from bagel_compress.codecs.kernels.threads import ordered
from bagel_compress.errors import CodecError
from bagel_compress.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch

CLOSE = 0.012  # bits a weight below the rate that need no other try
AIM = 0.005  # bits a weight below the rate that the next try aims at
TRIES = 6
COUNTED = 1 << 12  # codes beyond it are escapes whatever the low bits, and are counted together
WIDEST = 2.0**12  # a column's factor is between one over this and this


@dataclass(frozen=True, slots=True)
class Try:
    """The index of a step and the bits per weight that its levels took."""

    index: int
    bits: float


class EcqGrid(Grid):
    """The grid of one weight at one step; `retry` gives the grid of the next try."""

    def __init__(self, spec: TensorSpec, most: Sizes, tries: tuple[Try, ...] = (), index: int = 0) -> None:
        """`most`: what the stored parts may take. `index`: of the step, once there were tries."""
        self.levels = Levels()
        self.block = 1 if most.columns else spec.shape[1]
        self._spec, self._most, self._tries, self._index = spec, most, tries, index

    def scales(self, weights: torch.Tensor, curvature: Curvature) -> Scales:
        import torch

        factors = column_factors(curvature) if self._most.columns else torch.ones(1, device=weights.device)
        index = self._index if self._tries else self._first(weights / factors)
        step = torch.tensor([step_at(index)], dtype=torch.float32)
        steps = step.to(weights.device) * factors
        largest = float((weights.abs() / steps).max())
        if largest >= UNBOUNDED:
            raise CodecError(
                f"{self._spec.name}: holds a weight of {largest:.3g} steps, calibrated rounding counts to "
                f"{UNBOUNDED:.3g}; give this tensor rounding nearest, or codec raw."
            )
        stored = {"step": step} | ({COLUMN_STEPS: factors.bfloat16().cpu()} if self._most.columns else {})
        return Scales(steps[None], {f"{self._spec.name}.{key}": part for key, part in stored.items()})

    def pack(self, levels: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        import torch

        words = self.decode(levels, scales.values).cpu().view(torch.int16).numpy().view(np.uint16).reshape(-1)
        book, stream, run_bytes = coded(levels.cpu().numpy().reshape(-1), words)
        name = self._spec.name
        parts = {
            f"{name}.stream": torch.from_numpy(stream),
            f"{name}.run_bytes": torch.from_numpy(run_bytes),
            f"{name}.book": torch.from_numpy(book.stored()),
        }
        return parts | dict(scales.stored)

    def retry(self, stored: Mapping[str, torch.Tensor]) -> EcqGrid | None:
        """The next try's grid; None if these parts are small enough and close to the rate, or were the best of many."""
        weights, allowed = self._spec.numel, 8 * self._most.nbytes
        taken = 8 * sum(part.nbytes for part in stored.values())
        index = index_of(float(stored[f"{self._spec.name}.step"]))
        tries = (*self._tries, Try(index, taken / weights))
        rate = allowed / weights
        if taken <= allowed and (rate - tries[-1].bits < CLOSE or len(tries) >= TRIES):
            return None
        over = tries[-1].bits - (rate - AIM * max(1, len(tries) - 2))
        moved = index + (round(over / _slope(tries) * STEPS_PER_OCTAVE) or 1)
        return EcqGrid(self._spec, self._most, tries, moved)

    def _first(self, scaled: torch.Tensor) -> int:
        """The index of the step that meets the rate to nearest, for weights over their columns' factors."""
        import torch

        words = scaled.bfloat16().cpu().reshape(-1).view(torch.int16).numpy().view(np.uint16)
        counts = np.zeros(1 << 16, np.uint32)
        pack.count(words, counts)
        bits = 8 * self._most.nbytes - 16 * self._most.columns - margin(words.size)
        return index_of(Search(counts.astype(np.int64)).find(bits).step)


def _slope(tries: tuple[Try, ...]) -> float:
    """Bits a weight per octave of the step: 1 at fine steps, less at coarse ones."""
    if len(tries) < 2 or tries[-1].index == tries[-2].index:
        return 1.0
    octaves = (tries[-1].index - tries[-2].index) / STEPS_PER_OCTAVE
    return min(max((tries[-2].bits - tries[-1].bits) / octaves, 0.4), 1.5)


def column_factors(curvature: Curvature) -> torch.Tensor:
    """(K,) fp32 numbers that bf16 holds: 1 / sqrt(D), their geometric mean 1."""
    logs = curvature.conditional.double().clamp(min=1e-300).log() / -2
    limit = math.log(WIDEST)
    return (logs - logs.mean()).clamp(-limit, limit).exp().bfloat16().float()


def choose_book(codes: np.ndarray) -> Book:
    """The book of least bits for whole-numbered fp32 codes."""
    histogram = np.zeros(2 * COUNTED + 1, np.int64)
    pack.count_codes(codes, histogram)
    values, best, least = np.arange(-COUNTED, COUNTED + 1, dtype=np.float64), None, math.inf
    for low_bits in range(MAX_LOW_BITS + 1):
        symbols = symbols_of(values, low_bits)
        counts = np.bincount(symbols, histogram, ESCAPE + 1).astype(np.int64)
        book, cost = fit(counts, low_bits)
        bits = cost + low_bits * codes.size + 16 * book.symbols
        if bits < least - PLANE_GAIN * codes.size or best is None:
            best, least = book, bits
    assert best is not None
    return best


def coded(codes: np.ndarray, words: np.ndarray) -> tuple[Book, np.ndarray, np.ndarray]:
    """Whole-numbered fp32 codes and the uint16 words they decode to: book, uint8 stream, uint16 bytes of the runs."""
    book = choose_book(codes)
    tables, form = pack.coder(book.frequencies), (book.low_bits, book.escaping)
    known = book.frequencies > 0

    def one(start: int) -> tuple[np.ndarray, np.ndarray]:
        space, part = Workspace(), slice(start, min(start + BATCH, codes.size))
        n = part.stop - start
        sizes = np.empty(-(-n // RUN), np.int64)
        pack.split_codes(codes[part], book.low_bits, known, space.symbols[:n], space.lows[:n])
        size = pack.pack(space.symbols[:n], space.lows[:n], words[part], *form, *tables, *space.scratch, sizes)
        return space.stream[:size].copy(), sizes

    streams, sizes = zip(*ordered(one, range(0, codes.size, BATCH)), strict=True)
    return book, np.concatenate(streams), np.concatenate(sizes).astype(np.uint16)
