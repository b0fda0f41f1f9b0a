"""An embedding table that stays coded: on the CPU, rows are decoded when they are first looked up.

Decoding the table of the 7B model whole takes longer than reading the artifact, and 1.09 GB that a prompt hardly uses.
Decoded rows stay, in a buffer of which the system gives memory only for the pages that were written.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.df11.decode import Filling, check_parts


class DF11Embedding(nn.Module):
    """Rows of the one table of a unit, by id. It stays on the CPU, where it was made."""

    def __init__(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> None:
        """Raises CodecError on parts that make no sense."""
        super().__init__()
        [spec] = unit.specs
        stored = check_parts(unit, parts)
        self.num_embeddings, self.embedding_dim = spec.shape
        self.stored_bytes = sum(part.nbytes for part in parts.values())
        self._filling = Filling(stored, torch.empty(spec.numel, dtype=torch.bfloat16))
        self._positions = stored.positions
        self._there = np.zeros(stored.blocks, bool)  # blocks that are decoded

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """bf16 rows [*ids.shape, width]. Raises CodecError on a damaged stream."""
        for row in ids.unique().tolist():
            self._decode(row)
        return nn.functional.embedding(ids, self._filling.flat.view(self.num_embeddings, self.embedding_dim))

    def describe(self) -> dict[str, str]:
        """What this module is, for a census of a loaded model."""
        return {"codec": "df11", "stored": "df11", "compute": "bfloat16"}

    def _decode(self, row: int) -> None:
        """The blocks that hold a row's weights, unless they are there."""
        ends = (row * self.embedding_dim, (row + 1) * self.embedding_dim - 1)
        first, last = np.searchsorted(self._positions, ends, side="right") - 1
        for block in range(first, last + 1):
            if not self._there[block]:
                self._filling.blocks(block, block + 1)
                self._there[block] = True
