"""DF11 linears for a prediction of memory: they allocate what the real ones allocate, and decode nothing."""

from __future__ import annotations

import torch
from torch import nn

from bagel_compress.io.tensor_spec import TensorSpec


class FakeLinear(nn.Module):
    """x @ W.T + bias with W a stretch of the decoder's ring; what is stored is not held here."""

    compute_dtype = torch.bfloat16

    def __init__(self, spec: TensorSpec, bias: torch.Tensor | None, ring: torch.Tensor) -> None:
        """`ring`: 1-D uint8, the scratch memory that all linears of the format share."""
        super().__init__()
        self._shape = spec.shape
        self.register_buffer("ring", ring)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self._shape
        weight = self.get_buffer("ring")[: 2 * rows * columns].view(torch.bfloat16).view(rows, columns)
        return nn.functional.linear(x, weight, self.bias)
