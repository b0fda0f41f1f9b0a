"""nvfp4: e2m1 codes in blocks of 16 with e4m3fn scales: what Blackwell GPUs multiply natively.

Parts of `X.weight` of shape (N, K), K a multiple of 16 (compressed-tensors 0.20, "nvfp4-pack-quantized"):

    X.weight_packed          U8      (N, K/2)    even columns in the low nibble; bit 3 is the sign
    X.weight_scale           F8_E4M3 (N, K/16)
    X.weight_global_scale    F32     (1,)        weight = code * weight_scale / weight_global_scale

ComfyUI's files hold the same codes with the nibbles the other way round, the scales in the order of cuBLAS' 128x4 tiles
and the inverse of the global scale (codecs/comfyui.py). Read in the other's order they give noise without an error.

The global scale is a power of two, the smallest under which the largest block scale fits e4m3fn: a power of two costs
no precision, and every product of a weight is exact, so all decoders agree to the bit. Block scales reach down to 2^-9
of the global one, a range of 2^17; blocks below it get the smallest scale and lose up to all of their bits, and the
manifest counts them. Scale "absmax" maps a block's largest magnitude to 6. "mse" tries eight more around it, up to the
one that maps it to 4 ("four over six": between 4 and 6 the codes have a gap), and keeps that of least squared error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.block_floats import BlockFloat, Scaling, decode_blocks, scale_name
from bagel_compress.codecs.comfyui import check_padding, high_first, tiled
from bagel_compress.codecs.compressed_tensors import quantization_config
from bagel_compress.codecs.constants import FP4_MAX, FP8_MAX
from bagel_compress.codecs.loaders import Loader, comfyui, compressed_tensors, vllm_omni
from bagel_compress.codecs.matrix import as_floats, check_shapes
from bagel_compress.codecs.traits import Snippet, compressed_tensors_snippet
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

# Exponents of the global scale: below the first, products of a weight would leave the normal numbers of bf16; above
# the last no bf16 weight needs one.
EXPONENTS = (-110, 117)
LARGEST_LAST = 320.0  # block scale with the last exponent: 6 * 352 * 2^117 would overflow


class Nvfp4(BlockFloat):
    """NVFP4, block 16 along the input."""

    format: Literal["nvfp4"] = "nvfp4"
    block: ClassVar[int] = 16
    needs_top: ClassVar[bool] = True
    tag: ClassVar[str] = "4-bit"
    comfyui_format: ClassVar[str] = "nvfp4"
    # In bytes of e4m3fn, eight to an octave: from about 0.8 of absmax / 6 up to absmax / 4, 4 to 6 bytes above.
    offsets: ClassVar[tuple[int, ...]] = (0, 6, 5, 4, 3, 2, 1, -1, -2)

    @property
    def normal_error(self) -> float:
        return 0.081 if self.scale == "mse" else 0.095

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        (spec,) = unit.specs
        rows, columns = spec.shape
        return {
            self.codes_name(spec): PartSpec("U8", (rows, columns // 2)),
            scale_name(spec): PartSpec("F8_E4M3", (rows, columns // self.block)),
            global_name(spec): PartSpec("F32", (1,)),
        }

    def codes_name(self, spec: TensorSpec) -> str:
        return f"{spec.name}_packed"

    def scaling(self, spec: TensorSpec, top: int) -> Scaling:
        import numpy as np

        exponent = global_exponent(top)
        bytes_ = np.arange(256, dtype=np.uint8)
        values = e4m3_values(bytes_)
        largest = LARGEST_LAST if exponent == EXPONENTS[1] else FP8_MAX
        table = values * np.float32(2.0**exponent)
        magnitudes = as_floats(np.arange(0x8000, dtype=np.uint16))
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = np.minimum(magnitudes / np.float32(FP4_MAX) / np.float32(2.0**exponent), np.float32(largest))
        high = int(bytes_[:127][values[:127] <= largest][-1])
        stored = {global_name(spec): np.array([2.0**-exponent], np.float32)}
        return Scaling(table, 1, high, e4m3_bytes(wanted), stored, least=float(table[1]) * FP4_MAX / 2)

    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """bf16(code * (scale / global scale)), each step in fp32: compressed-tensors' own arithmetic."""
        (spec,) = unit.specs
        check_shapes(self, unit, parts)
        scales = parts[scale_name(spec)].float() / parts[global_name(spec)]
        return {spec.name: decode_blocks(parts[self.codes_name(spec)], scales, self.block)}

    def config(self, units: Sequence[Unit], others: Sequence[str]) -> dict[str, Any]:
        """compressed-tensors' scheme NVFP4A16: these weights, activations as they are."""
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "dynamic": False}
        weights |= {"group_size": self.block, "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
        return quantization_config("nvfp4-pack-quantized", weights, None, others)

    def comfyui_values(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same codes and scales in ComfyUI's order, and the global scale as a factor."""
        (spec,) = unit.specs
        check_padding(spec, self.block)
        return {
            spec.name: high_first(parts[self.codes_name(spec)]),
            scale_name(spec): tiled(parts[scale_name(spec)]),
            f"{spec.name}_scale_2": (1 / parts[global_name(spec)]).reshape(()),
        }

    def loaders(self) -> list[Loader]:
        return [
            compressed_tensors("RTX 50, B200"),
            comfyui("RTX 50, B200"),
            vllm_omni("its fused attention has no path for packed codes"),
        ]

    def snippets(self, repo: str, tensor: str, shard: str, alone: bool) -> list[Snippet]:
        scheme = 'num_bits=4, type="float", strategy="tensor_group", group_size=16'
        return [compressed_tensors_snippet(repo, tensor, shard, self.format, "NVFP4PackedCompressor", scheme)]


def global_name(spec: TensorSpec) -> str:
    return f"{spec.name}_global_scale"


def global_exponent(top: int) -> int:
    """The least k with absmax / 6 <= 448 * 2^k, absmax given by its bf16 word, within EXPONENTS."""
    mantissa, exponent = 1 + (top & 0x7F) / 128, (top >> 7) - 127
    least = exponent - 11 + (mantissa > 1.3125)  # 6 * 448 = 1.3125 * 2^11
    return int(min(max(least, EXPONENTS[0]), EXPONENTS[1]))


def e4m3_values(codes: np.ndarray) -> np.ndarray:
    """uint8 -> fp32 values of e4m3fn; 0 for its two NaN."""
    import numpy as np

    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, mantissa * 2.0**-9, normal) * np.where(codes > 127, -1.0, 1.0)
    return np.where((codes & 127) == 127, 0.0, values).astype(np.float32)


def e4m3_bytes(values: np.ndarray) -> np.ndarray:
    """Nearest e4m3fn byte of values up to 448, ties to even, and never below the smallest number; NaN gives that."""
    import torch

    codes = torch.from_numpy(values).nan_to_num(0.0).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.clamp(min=1).numpy()
