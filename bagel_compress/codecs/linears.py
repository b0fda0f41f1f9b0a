"""Run-time linears over stored codes: x @ W.T + bias without a full-precision copy of W.

Codes and scales stay in the module as plain buffers, byte for byte as they are in the file: a census can say what is
really held, a move takes them along, and fake tensors can stand for them when memory is predicted. A cast of the module
(`.to(dtype)`) leaves them alone.

On CPU, and wherever a device has no kernel for a format, the weight is decoded to bf16 and multiplied in the dtype of
x: exactly `F.linear(x, decoded.to(x.dtype), bias)`. On CUDA:

    nf4    bitsandbytes' gemm_4bit: the same decoded values, added in another order
    int8   bitsandbytes' LLM.int8 product: rows of x go to int8, columns with a value over 6 stay in fp16
    fp8    torch._scaled_mm (compute capability 8.9 and up, both dimensions a multiple of 16): rows of x go to e4m3fn;
           relative error of a product of random normal values 0.037, against 0.026 with x in bf16
    int4   decoded here too: its kernels are those of exports (ONNX Runtime, TensorRT)

The modules know no codec: each codec hands its parts and its decoder to the one that runs them.

Why not the modules of `bitsandbytes.nn`: `Linear4bit` repacks its weight in an eval forward on some CPUs, and its
parameters cannot be made of fake tensors.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from bagel_compress.io.tensor_spec import TensorSpec

Decoder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # codes (N, ...) and scales -> (N, K) bf16

OUTLIER = 6.0  # llm_int8_threshold of bitsandbytes and transformers
SCALED_MM_CAPABILITY = (8, 9)  # first CUDA capability with FP8 matrix units (Ada)
SCALED_MM_MULTIPLE = 16  # of both dimensions of W in torch._scaled_mm
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
NF4_BLOCK = 64  # weights per absmax


class CodedLinear(nn.Module, ABC):
    """A linear over the codes of one weight (out, in)."""

    codec: str  # the format's name
    codes: torch.Tensor

    def __init__(self, spec: TensorSpec, codes: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.shape = spec.shape
        self.out_features, self.in_features = spec.shape
        self.register_buffer("codes", codes)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x) if self.kernel is not None else self._multiply_decoded(x)

    @property
    @abstractmethod
    def kernel(self) -> str | None:
        """The kernel that multiplies with the codes on the device where they are; None: decode and multiply."""

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out) in the dtype of x, with `kernel`; a format without kernels leaves it as it is."""
        return self._multiply_decoded(x)

    @abstractmethod
    def decoded(self) -> torch.Tensor:
        """(out, in) bf16: what the codec's `decode` gives."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of the codes and scales held, without the bias."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def describe(self) -> dict[str, str]:
        """What this module is, for a census of a loaded model."""
        stored = str(self.codes.dtype).removeprefix("torch.")
        return {"codec": self.codec, "stored": stored, "compute": self.kernel or "decoded to bfloat16"}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.describe()}"

    def _multiply_decoded(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.decoded().to(x.dtype), self._bias(x))

    def _bias(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CodedLinear:
        """Follows a move to another device, not a cast."""
        moved: CodedLinear = super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)
        return moved


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
        library = _bitsandbytes() if self.codes.is_cuda and self.shape[1] % 2 == 0 else None
        return "bitsandbytes gemm_4bit" if hasattr(library, "gemm_4bit") else None

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        nested = self.nested_absmax is not None
        y: torch.Tensor = _bitsandbytes().gemm_4bit.default(
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
        library = _bitsandbytes()
        odd = self.shape[1] % 2 or self.codes.numel() * 2 % NF4_BLOCK  # it would compile a kernel for these
        if library is None or odd or (self.shape[1] % NF4_BLOCK and _on_cpu(self.codes)):
            # The last: its AVX-512 kernel (0.50.2) takes wrong scales where rows are not whole blocks.
            return self._decode(self.codes, absmax, self.shape)
        weight: torch.Tensor = library.dequantize_4bit.default(
            self.codes, absmax, NF4_BLOCK, "nf4", self.shape, torch.bfloat16
        )
        return weight


class ScaledLinear(CodedLinear):
    """Codes with scales beside them, `scale`, that `decode` turns into the weight."""

    scale: torch.Tensor

    def __init__(
        self, spec: TensorSpec, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, decode: Decoder
    ) -> None:
        super().__init__(spec, codes, bias)
        self.register_buffer("scale", scale)
        self._decode = decode

    def decoded(self) -> torch.Tensor:
        return self._decode(self.codes, self.scale)


class Int8Linear(ScaledLinear):
    """bitsandbytes LLM.int8 rows; `scale` is SCB, (N,) fp32."""

    codec = "int8"

    @property
    def kernel(self) -> str | None:
        return "bitsandbytes LLM.int8" if self.codes.is_cuda and _bitsandbytes() is not None else None

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """The steps of bitsandbytes' MatMul8bitLt with threshold 6."""
        library = _bitsandbytes()
        rows = x.reshape(-1, self.in_features)
        half = rows.to(torch.float16, copy=True)  # the quantiser blanks outliers in place for a moment
        codes, scales, outliers = library.int8_vectorwise_quant.default(half, OUTLIER)
        y, _ = library.int8_mixed_scaled_mm.default(
            rows, codes, self.codes, scales, self.scale, outliers, self._bias(x)
        )
        return y.reshape(*x.shape[:-1], self.out_features)


class Fp8Linear(ScaledLinear):
    """e4m3fn with a bf16 scale per output channel, (N, 1), or one for all, (1,)."""

    codec = "fp8"

    @property
    def kernel(self) -> str | None:
        fits = not any(size % SCALED_MM_MULTIPLE for size in self.shape)
        capable = self.codes.is_cuda and torch.cuda.get_device_capability(self.codes.device) >= SCALED_MM_CAPABILITY
        return "torch._scaled_mm" if capable and fits else None

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        absmax = rows.abs().amax(1, keepdim=True).float()
        scales = (absmax / FP8_MAX).clamp(min=1e-12)
        codes = (rows / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        columns = self.scale.float().reshape(1, -1).expand(1, self.out_features).contiguous()
        y = torch._scaled_mm(codes, self.codes.t(), scale_a=scales, scale_b=columns, out_dtype=torch.bfloat16)
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Int4Linear(ScaledLinear):
    """Symmetric INT4 in blocks of 32; no kernel, always decoded."""

    codec = "int4"
    kernel = None


def _on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not is_fake(tensor)


def is_fake(tensor: torch.Tensor) -> bool:
    """Tensors that have a shape and no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


@cache
def _bitsandbytes() -> Any:
    """The library's operators, or None where it is not installed."""
    if find_spec("bitsandbytes") is None:
        return None
    # At import it warns of a package that it can do without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401  (registers the operators)

    return torch.ops.bitsandbytes
