"""Layout: where every row of a calibration set lies while it goes through the layers.

All rows of all sequences lie in one matrix, in three groups: rows of the understanding expert in passes that are all
its own (text, ViT), its wrapper rows in latent passes, and the rows of the generation expert. The first two share their
weights; the last two have queries and keys normalised and turned in fp32, as the sampler does. So an expert works on
one range of rows, and attention gathers a pass's rows by index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel_compress.calibrate.calibration_set import (
    WRAPPERS,
    CalibrationSet,
    CleanLatent,
    DecodedText,
    ImagePass,
    NoisedLatent,
    RecordedSequence,
    TextPass,
)

Item = TextPass | ImagePass | CleanLatent | DecodedText | NoisedLatent


@dataclass(slots=True)
class Pass:
    """One packed pass of the model: an event of a trunk, or a branch."""

    item: Item
    rows: Tensor  # int64: its rows in the matrix, in the official order
    sees: int  # passes of its trunk that it attends to, besides itself
    rope: int  # position of its first row
    causal: bool
    on_trunk: bool  # later passes attend to it
    read: bool  # whether the last layer's result is used: a decoded text, a noised picture

    @property
    def positions(self) -> Tensor:
        """Rope positions of its rows: counted up in a text, all equal in a picture."""
        return (
            torch.arange(self.rope, self.rope + len(self.rows))
            if self.causal
            else torch.full_like(self.rows, self.rope)
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """Sequences as lists of passes; rows [0, narrow) are text and ViT, [narrow, und) wrappers, [und, total) latents."""

    sequences: tuple[tuple[Pass, ...], ...]
    narrow: int
    und: int
    total: int

    @property
    def passes(self) -> Iterator[Pass]:
        return (p for sequence in self.sequences for p in sequence)

    def positions(self) -> Tensor:
        """Rope position of every row."""
        found = torch.empty(self.total, dtype=torch.int64)
        for p in self.passes:
            found[p.rows] = p.positions
        return found

    def read_rows(self) -> Tensor:
        """Whether the last layer's result of a row is used, [total] bool."""
        found = torch.zeros(self.total, dtype=torch.bool)
        for p in self.passes:
            if p.read:
                found[p.rows] = True
        if self.und > self.narrow:
            found[self.narrow : self.und] = False
        return found


@dataclass(slots=True)
class _Counters:
    """Next free row of each group."""

    narrow: int = 0
    wrappers: int = 0
    gen: int = 0


def lay_out(calibration: CalibrationSet) -> Layout:
    """The layout of a set."""
    total = calibration.rows
    wrappers = WRAPPERS * sum(
        isinstance(item, CleanLatent | NoisedLatent)
        for s in calibration.header.sequences
        for item in (*s.trunk, *s.branches)
    )
    narrow = total.und - wrappers
    counters = _Counters(0, narrow, total.und)
    sequences = tuple(_sequence(calibration, reading, counters) for reading in calibration.header.sequences)
    return Layout(sequences, narrow, total.und, total.und + total.gen)


def _sequence(calibration: CalibrationSet, reading: RecordedSequence, counters: _Counters) -> tuple[Pass, ...]:
    ropes = [0]
    passes = []
    for index, event in enumerate(reading.trunk):
        rows = _take(counters, *calibration.rows_of(event))
        causal = isinstance(event, TextPass)
        passes.append(Pass(event, rows, index, ropes[-1], causal, on_trunk=True, read=False))
        ropes.append(ropes[-1] + (len(rows) if causal else 1))
    for branch in reading.branches:
        causal = isinstance(branch, DecodedText)
        rows = _take(counters, *calibration.rows_of(branch))
        passes.append(Pass(branch, rows, branch.after, ropes[branch.after], causal, on_trunk=False, read=True))
    return tuple(passes)


def _take(counters: _Counters, und: int, gen: int) -> Tensor:
    """The next rows of a pass: of one group, or two wrappers around latents."""
    if not gen:
        counters.narrow += und
        return torch.arange(counters.narrow - und, counters.narrow)
    counters.wrappers += WRAPPERS
    counters.gen += gen
    start, end = counters.wrappers - 2, counters.wrappers - 1
    inside = torch.arange(counters.gen - gen, counters.gen)
    return torch.cat([torch.tensor([start]), inside, torch.tensor([end])])
