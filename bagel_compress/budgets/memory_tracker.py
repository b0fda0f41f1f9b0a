"""Counts the bytes of all allocated tensor storages by category, and their peak in each phase of a run.

A torch dispatch mode adds the storage of every result when it is made and subtracts it when it is freed. It works on
fake tensors, for a prediction, and on real CPU tensors, by which tests check the prediction. It does not see memory
that an operator allocates and frees internally, the CUDA context, fragmentation, or the workspaces of libraries.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA_ROUNDING = 512  # bytes; kMinBlockSize of torch's CUDA caching allocator


@dataclass(slots=True)
class Peak:
    """The maximum of allocated bytes in a phase, by category, without the tensors that `hold` excluded."""

    name: str
    total: int = 0
    by_category: dict[str, int] = field(default_factory=dict)


class Tracker(TorchDispatchMode):
    """Counts storages that are made while it is active."""

    def __init__(
        self, category: Callable[[Tensor], str], rounding: int = CUDA_ROUNDING, scale: Mapping[str, float] | None = None
    ) -> None:
        """`category` gives the category of a tensor; `rounding` is the allocator's block size in bytes.

        `scale` maps categories to factors that their bytes are multiplied by, for a model that stands for a larger one.
        """
        super().__init__()
        self._scale = scale or {}
        self.peaks: list[Peak] = []
        self._current: Peak | None = None
        self._category, self._rounding = category, rounding
        self._living: dict[int, tuple[str, int]] = {}
        self._now: dict[str, int] = {}
        self._static: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Excludes the storages of these tensors (such as weights) from the count. Returns their bytes."""
        total = 0
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key not in self._static:
                self._static.add(key)
                total += self._rounded(tensor)
        return total

    def enter(self, phase: str) -> None:
        """Begins a phase, or resumes it if it was entered before. Storages that are allocated already count in it."""
        self._current = next((peak for peak in self.peaks if peak.name == phase), None) or Peak(phase)
        if self._current not in self.peaks:
            self.peaks.append(self._current)
        self._mark()

    @property
    def total(self) -> int:
        """Bytes that are allocated now."""
        return sum(self._now.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._living or key in self._static:
            return
        category = self._category(tensor)
        size = round(self._rounded(tensor) * self._scale.get(category, 1.0))
        self._living[key] = (category, size)
        self._now[category] = self._now.get(category, 0) + size
        weakref.finalize(storage, self._free, key)
        self._mark()

    def _free(self, key: int) -> None:
        category, size = self._living.pop(key, ("", 0))
        if size:
            self._now[category] -= size

    def _mark(self) -> None:
        if self._current is not None and self.total >= self._current.total:
            self._current.total = self.total
            self._current.by_category = dict(self._now)

    def _rounded(self, tensor: Tensor) -> int:
        return -(-tensor.untyped_storage().nbytes() // self._rounding) * self._rounding
