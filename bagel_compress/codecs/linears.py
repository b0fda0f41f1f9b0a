"""What run-time linears over stored codes have in common: x @ W.T + bias without a full-precision copy of W.

Codes and scales stay in the module as plain buffers, byte for byte as they are in the file: a census can say what is
really held, a move takes them along, and fake tensors can stand for them when memory is predicted. A cast of the module
(`.to(dtype)`) leaves them alone.

On CPU, and wherever a device has no kernel for a format, the weight is decoded to bf16 and multiplied in the dtype of
x: exactly `F.linear(x, decoded.to(x.dtype), bias)`. What a format does on CUDA stands in its own module beside the
codec (`nf4_linear`, `int8_linear`, `fp8_linear`, `int4_linear`). The modules know no codec: each codec hands its parts
and its decoder to the one that runs them.

Why not the modules of `bitsandbytes.nn`: `Linear4bit` repacks its weight in an eval forward on some CPUs, and its
parameters cannot be made of fake tensors.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bagel_compress.codecs.base import Codec, Unit
from bagel_compress.codecs.gradients import multiplied
from bagel_compress.io.tensor_spec import TensorSpec

Decoder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # codes (N, ...) and scales -> (N, K) bf16


class CodedLinear(nn.Module, ABC):
    """A linear over the codes of one weight (out, in)."""

    codec: str  # the format's name
    codes: torch.Tensor
    computes_in = torch.bfloat16  # dtype that x is wanted in; set by whoever runs the model in another one

    def __init__(self, spec: TensorSpec, codes: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.shape = spec.shape
        self.out_features, self.in_features = spec.shape
        self.register_buffer("codes", codes)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self._multiply_decoded if self.kernel is None else self.multiply
        return multiplied(x, product, self.decoded)

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


class StoredLinear(CodedLinear):
    """Any codec's stored parts, decoded by the codec in every call: slow and right."""

    def __init__(
        self, codec: Codec, spec: TensorSpec, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None
    ) -> None:
        names = list(codec.parts(Unit(spec.name, (spec,))))
        super().__init__(spec, parts[names[0]], bias)
        self.codec = codec.format
        self._codec, self._spec, self._names = codec, spec, names
        for index, name in enumerate(names[1:]):
            self.register_buffer(f"part{index + 1}", parts[name])

    kernel = None

    def decoded(self) -> torch.Tensor:
        parts = dict(zip(self._names, self.buffers(), strict=True))
        return self._codec.decode(Unit(self._spec.name, (self._spec,)), parts)[self._spec.name]


def on_cpu(tensor: torch.Tensor) -> bool:
    """A tensor with values, in host memory."""
    return tensor.device.type == "cpu" and not is_fake(tensor)


def is_fake(tensor: torch.Tensor) -> bool:
    """Tensors that have a shape and no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


@cache
def bitsandbytes_ops() -> Any:
    """The library's operators, or None where it is not installed."""
    if find_spec("bitsandbytes") is None:
        return None
    # At import it warns of a package that it can do without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401  (registers the operators)

    return torch.ops.bitsandbytes
