"""Linears of ring.py for a prediction of memory: they allocate what the real ones allocate, and decode nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from bagel_compress.io.tensor_spec import TensorSpec


def fake_linear(spec: TensorSpec, bias: torch.Tensor | None, ring: torch.Tensor, most: int) -> nn.Module:
    """A linear whose weight is decoded whole, or slice by slice if it has more than `most` weights."""
    rows, columns = spec.shape
    step = rows if rows * columns <= most else max(1, most // columns)
    if step == rows:
        return FakeLinear(spec, bias, ring)
    shapes = [(min(step, rows - first), columns) for first in range(0, rows, step)]
    return FakeSlices([FakeLinear(TensorSpec(spec.dtype, shape, spec.name), None, ring) for shape in shapes], bias)


class FakeSlices(nn.Module):
    """A linear whose output features come slice by slice."""

    compute_dtype = torch.bfloat16

    def __init__(self, slices: list[FakeLinear], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.slices = nn.ModuleList(slices)
        self.out_features, self.in_features = sum(part.out_features for part in slices), slices[0].in_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([part(x) for part in self.slices], dim=-1)
        return y if self.bias is None else y + self.bias


class FakeLinear(nn.Module):
    """x @ W.T + bias with W a stretch of the decoder's ring; what is stored is not held here."""

    compute_dtype = torch.bfloat16

    def __init__(self, spec: TensorSpec, bias: torch.Tensor | None, ring: torch.Tensor) -> None:
        """`ring`: 1-D uint8, the scratch memory that all linears of the format share."""
        super().__init__()
        self.out_features, self.in_features = spec.shape
        self.register_buffer("ring", ring)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.out_features, self.in_features
        weight = self.get_buffer("ring")[: 2 * rows * columns].view(torch.bfloat16).view(rows, columns)
        return nn.functional.linear(x, weight, self.bias)


class FakeTable(nn.Module):
    """An embedding table whose rows are decoded when they are looked up, each once."""

    def __init__(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._width = spec.shape[1]
        for name, part in parts.items():
            self.register_buffer(name.replace(".", "_"), part)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(ids.numel(), self._width, dtype=torch.bfloat16)
        return rows[torch.zeros_like(ids)]
