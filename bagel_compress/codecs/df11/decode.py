"""The stored parts of a unit back to bf16, on the CPU. Every inconsistency is a CodecError that names the unit.

The kernels, and numba with them, are imported when something is decoded: a model opens without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.df11.layout import (
    BLOCK_BITS,
    BLOCK_BYTES,
    FIRST_POINTER,
    GAP_BYTES,
    MAX_CODE_BITS,
    MAX_LEVELS,
    MAX_TABLES,
    SUFFIXES,
)
from bagel_compress.codecs.kernels.threads import split
from bagel_compress.errors import CodecError

GRAIN = 16  # blocks that are worth a thread: about 200,000 weights


@dataclass(frozen=True, slots=True)
class CheckedParts:
    """The parts of one unit on their device, checked for everything but the stream itself; the small ones as numpy."""

    name: str
    luts: np.ndarray  # uint8 [tables + 1, 256]
    positions: np.ndarray  # int64 [blocks + 1]
    stream: torch.Tensor  # uint8
    rest: torch.Tensor  # uint8 [weights]
    gaps: torch.Tensor  # uint8, packed

    @property
    def blocks(self) -> int:
        return len(self.positions) - 1


def decode_into(stored: CheckedParts, out: torch.Tensor) -> torch.Tensor:
    """Decodes into the front of a 1-D bf16 CPU buffer; returns that front. Raises CodecError on a damaged stream."""
    filling = Filling(stored, out)
    split(filling.blocks, filling.inner, GRAIN)
    filling.blocks(filling.inner, stored.blocks)
    return filling.flat


class Filling:
    """The front of a 1-D bf16 CPU buffer, `flat`, that is filled with a unit's weights block by block."""

    def __init__(self, stored: CheckedParts, out: torch.Tensor) -> None:
        self.flat = out[: stored.rest.numel()]
        # The kernel reads a few bytes past a block: the last two blocks are decoded from a padded copy.
        self.inner = max(0, stored.blocks - 2)
        self._stored = stored

    def blocks(self, start: int, stop: int) -> None:
        """Decodes blocks [start, stop). Raises CodecError on a damaged stream."""
        from bagel_compress.codecs.df11 import unpack

        border = min(max(start, self.inner), stop)
        padded = self._end.ctypes.data - self.inner * BLOCK_BYTES
        for first, last, base in ((start, border, self._stored.stream.data_ptr()), (border, stop, padded)):
            status = unpack.unpack_blocks((first, last), base, *self._args)
            if status != unpack.OK:
                raise _damaged(self._stored.name, unpack.REASONS[status])

    @cached_property
    def _end(self) -> np.ndarray:
        from bagel_compress.codecs.df11 import unpack

        end = self._stored.stream.numpy()[self.inner * BLOCK_BYTES :]
        return np.concatenate([end, np.zeros(unpack.READ_SLACK, np.uint8)])

    @cached_property
    def _args(self) -> tuple[Any, ...]:
        from bagel_compress.codecs.df11 import unpack

        stored = self._stored
        words = self.flat.view(torch.int16).numpy().view(np.uint16)
        table, rest, gaps = unpack.lookup_table(stored.luts), stored.rest.numpy(), stored.gaps.numpy()
        return (stored.stream.numel(), table, stored.luts, gaps, stored.positions, rest, words)


def check_parts(unit: Unit, parts: Mapping[str, torch.Tensor]) -> CheckedParts:
    """Names, dtypes and sizes of the six parts, block positions, tables. Raises CodecError."""
    tensors = {suffix: _part(unit.name, suffix, parts) for suffix in SUFFIXES}
    stream, rest, gaps = (tensors[s] for s in ("encoded_exponent", "sign_mantissa", "gaps"))
    blocks = -(-stream.numel() // BLOCK_BYTES)
    ends = np.cumsum([spec.numel for spec in unit.specs])[:-1]
    for suffix, found, expected in (
        ("sign_mantissa", rest.numel(), unit.numel),
        ("gaps", gaps.numel(), GAP_BYTES * blocks),
        ("output_positions", tensors["output_positions"].numel(), 4 * (blocks + 1)),
        ("split_positions", tensors["split_positions"].tolist(), ends.tolist()),
    ):
        if found != expected:
            raise _damaged(unit.name, f"{suffix} is {found}, expected {expected}")
    positions = tensors["output_positions"].cpu().numpy().view("<u4").astype(np.int64)
    steps = np.diff(positions)
    if positions[0] != 0 or positions[-1] != unit.numel or (steps < 0).any() or (steps > BLOCK_BITS).any():
        raise _damaged(unit.name, "output_positions do not rise from 0 to the number of weights")
    luts = tensors["luts"].cpu().numpy()
    _check_tables(unit.name, luts)
    return CheckedParts(unit.name, luts, positions, stream, rest, gaps)


def _part(unit: str, suffix: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    name, dtype = f"{unit}.{suffix}", torch.int64 if suffix == "split_positions" else torch.uint8
    if name not in parts:
        raise _damaged(unit, f"{suffix} is missing")
    tensor = parts[name]
    if tensor.dtype != dtype or tensor.dim() != (2 if suffix == "luts" else 1):
        raise _damaged(unit, f"{suffix} is {tensor.dtype} of {tensor.dim()} dimensions, expected {dtype}")
    return tensor.detach().contiguous()


def _check_tables(unit: str, luts: np.ndarray) -> None:
    """The tables are those of a complete prefix code: no slot, pointer or length is off, bar those of the padding."""
    tables = len(luts) - 1
    if luts.shape[1] != 256 or not 1 <= tables <= MAX_TABLES:
        raise _damaged(unit, f"luts is {luts.shape}, expected (2 to {MAX_TABLES + 1}, 256)")
    lengths, used = luts[-1].astype(int), np.flatnonzero(luts[-1])
    if used.size == 0 or used[-1] >= FIRST_POINTER or lengths.max() > MAX_CODE_BITS:
        raise _damaged(unit, "the last row of luts holds no code lengths")
    levels, missing, spare = {0: 0}, set(used.tolist()), []
    for row in range(tables):
        level = levels.get(row, MAX_LEVELS)
        taken = 0
        for value, slots in zip(*np.unique(luts[row], return_counts=True), strict=True):
            if value >= FIRST_POINTER:
                levels.setdefault(256 - int(value), level + 1)
                taken += 1
            elif value in missing and slots >= (share := _slots(lengths[value], level)) > 0:
                missing.discard(int(value))
                taken += share
        if taken < 256:
            spare.append((256 - taken) << (8 * (MAX_LEVELS - 1 - level)) if level < MAX_LEVELS else 0)
    free = (1 << MAX_CODE_BITS) - sum(1 << (MAX_CODE_BITS - lengths[e]) for e in used)
    if missing or sorted(levels) != list(range(tables)) or spare != [free] or free.bit_count() != 1:
        raise _damaged(unit, "luts are no complete prefix code")


def _slots(bits: int, level: int) -> int:
    """Slots that a code takes in a table of this level; 0 if it does not end there."""
    return 1 << (8 * level + 8 - bits) if 8 * level < bits <= 8 * level + 8 else 0


def _damaged(unit: str, what: str) -> CodecError:
    return CodecError(f"{unit}: {what}; the stored unit is damaged or belongs to another one: build or fetch it again.")
