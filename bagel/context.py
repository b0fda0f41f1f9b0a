"""Context: what the model has read so far, as cached keys and values plus the next rope position.

Contexts work like slices over a shared array: `fork` costs nothing, and whoever appends first at the end of the shared
storage does so in place; anyone else copies its own rows once and owns the copy from then on. So the guidance branches,
which are prefixes of each other, share one cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from bagel.config import LLMConfig

GROW_TOKENS = 256  # storage grows to a multiple of this; one step is 14.7 MB for the 7B model in bf16


class _Storage:
    """Keys and values of all layers; rows [0, filled) are taken. A run of layers on one device shares one tensor."""

    def __init__(self, config: LLMConfig, capacity: int, dtype: torch.dtype, devices: Sequence[torch.device]) -> None:
        rest = (2, config.num_kv_heads, capacity, config.head_dim)
        runs = [(len(list(run)), device) for device, run in groupby(devices)]
        self.data = [torch.empty(count, *rest, dtype=dtype, device=device) for count, device in runs]
        self.layers = [layer for run in self.data for layer in run.unbind()]  # views [2, K, capacity, E]
        self.filled = 0

    @property
    def capacity(self) -> int:
        return self.data[0].shape[3]


class Context:
    """One sample's cache. `length` counts cached tokens, `rope` is the position of the next token."""

    def __init__(self, config: LLMConfig, dtype: torch.dtype, devices: Sequence[torch.device]) -> None:
        """`devices`: of each layer; its keys and values live there."""
        self._config, self._dtype, self._devices = config, dtype, devices
        self._storage: _Storage | None = None
        self.length = 0
        self.rope = 0

    def fork(self) -> Context:
        """An independent context with the same content. Shares storage; copies nothing."""
        twin = Context(self._config, self._dtype, self._devices)
        twin._storage, twin.length, twin.rope = self._storage, self.length, self.rope
        return twin

    def reserve(self, count: int) -> None:
        """Makes the next `count` rows this context's own to write. They count only after `advance`."""
        storage, need = self._storage, self.length + count
        if storage is not None and storage.filled == self.length and need <= storage.capacity:
            storage.filled = need
            return
        capacity = -(-need // GROW_TOKENS) * GROW_TOKENS
        grown = _Storage(self._config, capacity, self._dtype, self._devices)
        if storage is not None:
            for new, old in zip(grown.data, storage.data, strict=True):
                new[:, :, :, : self.length] = old[:, :, :, : self.length]
        grown.filled = need
        self._storage = grown

    def write(self, layer: int, k_TKE: Tensor, v_TKE: Tensor) -> None:
        """Puts one layer's keys and values into the reserved rows."""
        assert self._storage is not None, "reserve() comes before write()"
        rows = self._storage.layers[layer][:, :, self.length : self.length + k_TKE.shape[0]]
        rows[0] = k_TKE.transpose(0, 1)
        rows[1] = v_TKE.transpose(0, 1)

    def advance(self, count: int, rope_step: int) -> None:
        """The reserved rows are now part of the context."""
        self.length += count
        self.rope += rope_step

    def keys_values(self, layer: int, extra: int = 0) -> tuple[Tensor, Tensor]:
        """Cached keys and values of a layer, views of [S, K, E]; with `extra`, reserved and written rows as well."""
        if self._storage is None:
            heads, width = self._config.num_kv_heads, self._config.head_dim
            empty = torch.empty(0, heads, width, dtype=self._dtype, device=self._devices[layer])
            return empty, empty
        rows = self._storage.layers[layer][:, :, : self.length + extra]
        return rows[0].transpose(0, 1), rows[1].transpose(0, 1)

    @property
    def layers(self) -> int:
        return self._config.num_layers

    @property
    def nbytes(self) -> int:
        """Bytes of the storage this context can see (shared ones count fully)."""
        return 0 if self._storage is None else sum(run.nbytes for run in self._storage.data)
