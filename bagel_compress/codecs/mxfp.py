"""mxfp4 and mxfp8: the OCP microscaling formats, blocks of 32 with a power of two (E8M0) for a scale.

Parts of `X.weight` of shape (N, K), K a multiple of 32 (compressed-tensors 0.20):

    mxfp4, "mxfp4-pack-quantized"    X.weight_packed  U8      (N, K/2)    e2m1, even columns in the low nibble
    mxfp8, "mxfp8-quantized"         X.weight         F8_E4M3 (N, K)
    both                             X.weight_scale   U8      (N, K/32)   the scale is 2^(byte - 127)

Blackwell GPUs multiply both natively. Scale "absmax" is the smallest power of two under which no weight is clipped.
mxfp4's "mse" also tries half and twice of it. For mxfp8 there is nothing to search: e4m3fn is as precise at every size,
so a smaller scale only clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.block_floats import BlockFloat, Scaling, decode_blocks, scale_name
from bagel_compress.codecs.comfyui import check_padding, tiled
from bagel_compress.codecs.compressed_tensors import quantization_config
from bagel_compress.codecs.loaders import Loader, comfyui, compressed_tensors, vllm_omni
from bagel_compress.codecs.matrix import check_shapes
from bagel_compress.codecs.traits import Snippet, compressed_tensors_snippet
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    import torch

BIAS = 127  # of E8M0
PACKED = "its fused attention has no path for packed codes"
LOW = 11  # 2^-116: every product with a level is a normal bf16 number, so no decoder rounds or flushes it


class _Mx(BlockFloat):
    """A power of two for each block of 32."""

    block: ClassVar[int] = 32
    top_exponent: ClassVar[int]  # of the largest level, and what follows its leading one, in 128ths
    top_mantissa: ClassVar[int]

    def scaling(self, spec: TensorSpec, top: int) -> Scaling:
        import numpy as np

        words = np.arange(0x8000, dtype=np.int32)
        exponent = (words >> 7) - BIAS - self.top_exponent + ((words & 0x7F) > self.top_mantissa)
        high = BIAS + 127 - self.top_exponent  # 448 * 2^119 and 6 * 2^125 are bf16 numbers
        with np.errstate(over="ignore"):
            table = np.ldexp(np.float32(1), np.arange(256, dtype=np.int32) - BIAS).astype(np.float32)
        return Scaling(table, LOW, high, (exponent + BIAS).clip(LOW, high).astype(np.uint8))

    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """code * 2^(byte - 127), which bf16 holds."""
        (spec,) = unit.specs
        check_shapes(self, unit, parts)
        return {spec.name: decode_blocks(parts[self.codes_name(spec)], powers(parts[scale_name(spec)]), self.block)}

    def _weights(self, bits: int) -> dict[str, Any]:
        numbers = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": "group", "dynamic": False}
        return numbers | {"group_size": self.block, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}


class Mxfp4(_Mx):
    """MXFP4: e2m1 codes."""

    format: Literal["mxfp4"] = "mxfp4"
    offsets: ClassVar[tuple[int, ...]] = (0, -1, 1)
    top_exponent: ClassVar[int] = 2  # 6 = 1.5 * 2^2
    top_mantissa: ClassVar[int] = 64
    tag: ClassVar[str] = "4-bit"

    @property
    def normal_error(self) -> float:
        return 0.112 if self.scale == "mse" else 0.118

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        (spec,) = unit.specs
        rows, columns = spec.shape
        codes = PartSpec("U8", (rows, columns // 2))
        return {self.codes_name(spec): codes, scale_name(spec): PartSpec("U8", (rows, columns // self.block))}

    def codes_name(self, spec: TensorSpec) -> str:
        return f"{spec.name}_packed"

    def config(self, units: Sequence[Unit], others: Sequence[str]) -> dict[str, Any]:
        """compressed-tensors' scheme MXFP4A16: these weights, activations as they are."""
        return quantization_config("mxfp4-pack-quantized", self._weights(4), None, others)

    def snippets(self, repo: str, tensor: str, shard: str, alone: bool) -> list[Snippet]:
        scheme = 'num_bits=4, type="float", strategy="group", group_size=32'
        return [compressed_tensors_snippet(repo, tensor, shard, self.format, "MXFP4PackedCompressor", scheme)]

    def loaders(self) -> list[Loader]:
        return [compressed_tensors("RTX 50, B200"), vllm_omni(PACKED)]


class Mxfp8(_Mx):
    """MXFP8: e4m3fn codes."""

    format: Literal["mxfp8"] = "mxfp8"
    scale: Literal["absmax"] = "absmax"
    eight_bits: ClassVar[bool] = True
    offsets: ClassVar[tuple[int, ...]] = (0,)
    top_exponent: ClassVar[int] = 8  # 448 = 1.75 * 2^8
    top_mantissa: ClassVar[int] = 96
    tag: ClassVar[str] = "8-bit"
    comfyui_format: ClassVar[str] = "mxfp8"

    @property
    def normal_error(self) -> float:
        return 0.0266

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        (spec,) = unit.specs
        scales = PartSpec("U8", (spec.shape[0], spec.shape[1] // self.block))
        return {spec.name: PartSpec("F8_E4M3", spec.shape), scale_name(spec): scales}

    def codes_name(self, spec: TensorSpec) -> str:
        return spec.name

    def config(self, units: Sequence[Unit], others: Sequence[str]) -> dict[str, Any]:
        """compressed-tensors' scheme MXFP8: activations go to the same format as they come."""
        weights = self._weights(8)
        return quantization_config("mxfp8-quantized", weights, weights | {"dynamic": True}, others)

    def comfyui_values(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same codes, and the scales in the order of cuBLAS' tiles."""
        (spec,) = unit.specs
        check_padding(spec, self.block)
        return {spec.name: parts[spec.name], scale_name(spec): tiled(parts[scale_name(spec)])}

    def snippets(self, repo: str, tensor: str, shard: str, alone: bool) -> list[Snippet]:
        scheme = 'num_bits=8, type="float", strategy="group", group_size=32'
        return [compressed_tensors_snippet(repo, tensor, shard, self.format, "MXFP8QuantizationCompressor", scheme)]

    def loaders(self) -> list[Loader]:
        return [compressed_tensors("RTX 50, B200"), comfyui("RTX 50, B200")]


def powers(scales: torch.Tensor) -> torch.Tensor:
    """uint8 E8M0 -> fp32: 2^(byte - 127); bytes from 1 to 254."""
    import torch

    return (scales.int() << 23).view(torch.float32)
