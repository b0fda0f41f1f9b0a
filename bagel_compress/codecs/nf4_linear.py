"""NF4 at run time. On CUDA bitsandbytes' gemm_4bit: the same decoded values, added in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from bagel_compress.codecs.constants import NF4_BLOCK
from bagel_compress.codecs.linears import CodedLinear, bitsandbytes_ops, on_cpu
from bagel_compress.io.tensor_spec import TensorSpec


class Nested(NamedTuple):
    """NF4's absmax in double quantisation: what its uint8 codes mean."""

    absmax: torch.Tensor  # (B/256,) fp32
    values: torch.Tensor  # (256,) fp32
    offset: torch.Tensor  # () fp32


class Nf4Linear(CodedLinear):
    """bitsandbytes NF4; with double quantisation the statistics stay nested.

    `decode` takes codes, fp32 absmax and the shape; `unnest` makes fp32 absmax of its codes and what `Nested` holds.
    """

    codec = "nf4"
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_map: torch.Tensor | None
    offset: torch.Tensor | None

    def __init__(
        self,
        spec: TensorSpec,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        nested: Nested | None,
        bias: torch.Tensor | None,
        decode: Callable[[torch.Tensor, torch.Tensor, tuple[int, ...]], torch.Tensor],
        unnest: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__(spec, codes, bias)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested.absmax if nested else None)
        self.register_buffer("nested_map", nested.values if nested else None)
        self.register_buffer("offset", nested.offset if nested else None)
        self._decode, self._unnest = decode, unnest

    @property
    def kernel(self) -> str | None:
        library = bitsandbytes_ops() if self.codes.is_cuda and self.shape[1] % 2 == 0 else None
        return "bitsandbytes gemm_4bit" if hasattr(library, "gemm_4bit") else None

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        nested = self.nested_absmax is not None
        y: torch.Tensor = bitsandbytes_ops().gemm_4bit.default(
            x,
            self.codes,
            self.shape,
            self.nested_absmax if nested else self.absmax,
            NF4_BLOCK,
            "nf4",
            bias=self._bias(x),
            absmax_8bit=self.absmax if nested else None,
            absmax_code=self.nested_map,
            absmax_offset=self.offset,
        )
        return y

    def decoded(self) -> torch.Tensor:
        absmax = self.absmax
        if self.nested_absmax is not None and self.nested_map is not None and self.offset is not None:
            absmax = self._unnest(absmax, self.nested_absmax, self.nested_map, self.offset)
        library = bitsandbytes_ops()
        odd = self.shape[1] % 2 or self.codes.numel() * 2 % NF4_BLOCK  # it would compile a kernel for these
        if library is None or odd or (self.shape[1] % NF4_BLOCK and on_cpu(self.codes)):
            # The last: its AVX-512 kernel (0.50.2) takes wrong scales where rows are not whole blocks.
            return self._decode(self.codes, absmax, self.shape)
        weight: torch.Tensor = library.dequantize_4bit.default(
            self.codes, absmax, NF4_BLOCK, "nf4", self.shape, torch.bfloat16
        )
        return weight
