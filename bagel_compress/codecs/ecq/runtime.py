"""Running from ecq weights: linears that decode into the scratch ring, and an embedding table that stays coded.

A weight larger than SLICE is multiplied slice by slice, so that the head needs no more scratch memory than a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.ecq.device import StoredWeight
from bagel_compress.codecs.ecq.layout import RUN, SLICE
from bagel_compress.codecs.ring import RingLinear, decoder_of


def linear(unit: Unit, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> nn.Module:
    """x @ W.T + bias over the stored parts of W. Raises CodecError on damage."""
    slices = StoredWeight(unit, parts).slices(SLICE)
    for part in slices:
        decoder_of(part.device).expect(part)
    if len(slices) == 1:
        return RingLinear("ecq", slices[0], unit.name, bias)
    return SlicedLinear([RingLinear("ecq", part, unit.name, None) for part in slices], bias)


class SlicedLinear(nn.Module):
    """A linear whose output features come slice by slice."""

    def __init__(self, slices: list[RingLinear], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.slices = nn.ModuleList(slices)
        self.out_features, self.in_features = sum(part.out_features for part in slices), slices[0].in_features
        self.stored_bytes = sum(part.stored_bytes for part in slices)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([part(x) for part in self.slices], dim=-1)
        return y if self.bias is None else y + self.bias

    def describe(self) -> dict[str, str]:
        """What this module is, for a census of a loaded model."""
        return {"codec": "ecq", "stored": "ecq", "compute": "bfloat16"}


class EcqEmbedding(nn.Module):
    """Rows of a table by id, decoded when they are looked up: two or three runs for a row of 3584."""

    def __init__(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> None:
        """Raises CodecError on parts that make no sense."""
        super().__init__()
        self._table = StoredWeight(unit, parts)
        self.num_embeddings, self.embedding_dim = self._table.shape
        self.stored_bytes = self._table.nbytes

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """bf16 rows [*ids.shape, width]. Raises IndexError as torch does, CodecError on a damaged stream on the CPU."""
        wanted, places = ids.unique(return_inverse=True)
        if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < self.num_embeddings:
            raise IndexError(f"ids from {wanted[0]} to {wanted[-1]}, the table has {self.num_embeddings} rows")
        rows = torch.empty(wanted.numel(), self.embedding_dim, dtype=torch.bfloat16, device=self._table.device)
        buffer = rows.new_empty(self.embedding_dim + 2 * RUN)
        for row, target in zip(wanted.tolist(), rows, strict=True):
            start = row * self.embedding_dim
            first, last = start // RUN, -(-(start + self.embedding_dim) // RUN)
            runs = self._table.decode_runs(first, last, buffer)
            target.copy_(runs[start - first * RUN :][: self.embedding_dim])
        return rows[places.to(rows.device)].to(ids.device)

    def describe(self) -> dict[str, str]:
        """What this module is, for a census of a loaded model."""
        return {"codec": "ecq", "stored": "ecq", "compute": "bfloat16"}
