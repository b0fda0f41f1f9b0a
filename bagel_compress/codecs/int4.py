"""int4: signed four-bit codes, one bf16 scale per 32 weights of a row: compressed-tensors' "pack-quantized" W4A16.

Parts of `X.weight` of shape (N, K), K a multiple of 32 (compressed-tensors 0.20, `pack_to_int32`):

    X.weight_packed    I32  (N, K/8)     eight codes a word, first in the lowest bits, stored as code + 8
    X.weight_scale     BF16 (N, K/32)
    X.weight_shape     I64  (2,)         N, K

The format of TensorRT and of standard ONNX for four bits (DequantizeLinear with blocks of 32); NF4 is closer to the
weights at the same size, but has no operator there. Scale "absmax" is compressed-tensors' own rule, absmax / 7.5;
"mse" tries smaller ones and keeps what leaves the least squared error in each block, then takes back by how much that
shrank the block. Codes are rounded with the bf16 scale that is stored, or was found. Zero blocks get the scale 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bagel_compress.codecs.base import Chunk, Encoding, Reader, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec
from bagel_compress.codecs.grid import Curvature, Grid, Levels, Scales, block_absmax, searched
from bagel_compress.codecs.matrix import MatrixCodec, check_shapes, not_finite
from bagel_compress.codecs.traits import FormName, OnnxCodes, Snippet, compressed_tensors_snippet
from bagel_compress.errors import CodecError, PlanError
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    import torch

BLOCK = 32  # weights per scale
CHUNK_ELEMENTS = 1 << 20  # coded at a time; a search holds some fp32 copies of it
LEVELS = 7.5  # half of the 15 steps between -8 and 7
SHRINK = {"absmax": (1.0,), "mse": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}  # factors on absmax that are tried
WIDE = 3.0e38  # blocks beyond it use codes -7..7, so that no decoded value overflows


class Int4(CalibratedCodec, MatrixCodec):
    """Symmetric INT4, block 32 along the input."""

    format: Literal["int4"] = "int4"
    scale: Literal["absmax", "mse"] = "absmax"
    tag: ClassVar[str] = "4-bit"

    def check(self, unit: Unit) -> None:
        super().check(unit)
        for spec in unit.specs:
            if spec.shape[1] % BLOCK:
                raise PlanError(
                    f"{spec.name}: codec int4 needs rows of a multiple of {BLOCK} weights, found {spec.shape[1]};"
                    " give it codec int8 or raw in the recipe."
                )

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        (spec,) = unit.specs
        rows, columns = spec.shape
        return {
            f"{spec.name}_packed": PartSpec("I32", (rows, columns // 8)),
            f"{spec.name}_scale": PartSpec("BF16", (rows, columns // BLOCK)),
            f"{spec.name}_shape": PartSpec("I64", (2,)),
        }

    def begin(self, unit: Unit, source: Reader) -> Encoding:
        return _Int4Encoding(codec=self, parts=self.parts(unit), spec=unit.specs[0], source=source)

    def grid(self, spec: TensorSpec) -> Grid:
        return _Int4Grid(self, spec)

    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """bf16(code * scale), the product in fp32."""
        (spec,) = unit.specs
        return {spec.name: decode_codes(*self._stored(spec, parts))}

    def linear(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> torch.nn.Module:
        from bagel_compress.codecs.int4_linear import Int4Linear

        check_shapes(self, Unit(spec.name, (spec,)), parts)
        return Int4Linear(spec, parts[f"{spec.name}_packed"], parts[f"{spec.name}_scale"], bias, decode_codes)

    def config(self, units: Sequence[Unit], others: Sequence[str]) -> dict[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": BLOCK,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": group},
                "ignore": list(others),
                "kv_cache_scheme": None,
            }
        }

    def snippets(self, repo: str, tensor: str, shard: str, alone: bool) -> list[Snippet]:
        scheme = 'num_bits=4, type="int", strategy="group", group_size=32'
        return [compressed_tensors_snippet(repo, tensor, shard, self.format, "PackedQuantizationCompressor", scheme)]

    def onnx_form(self, tensor: str, runtime: str, activations: str) -> FormName:
        return "int4"

    def onnx_codes(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> OnnxCodes:
        """Codes -8..7 (N, K) and scales (N, K/32)."""
        return OnnxCodes(unpack(parts[f"{spec.name}_packed"]).numpy(), parts[f"{spec.name}_scale"].float(), "INT4")

    def _stored(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        for name, part in self.parts(Unit(spec.name, (spec,))).items():
            found = tuple(parts[name].shape) if name in parts else None
            if found != part.shape:
                raise CodecError(f"{name}: expected shape {list(part.shape)}, found {found}; the artifact is damaged.")
        shape = tuple(parts[f"{spec.name}_shape"].tolist())
        if shape != spec.shape:
            raise CodecError(f"{spec.name}: weight_shape says {shape}, expected {spec.shape}; the artifact is damaged.")
        return parts[f"{spec.name}_packed"], parts[f"{spec.name}_scale"]


def decode_codes(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(N, K/8) int32 and (N, K/32) bf16 -> (N, K) bf16: bf16(code * scale), the product in fp32."""
    import torch

    rows, columns = packed.shape[0], packed.shape[1] * 8
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=packed.device)
    step = max(1, CHUNK_ELEMENTS // columns)
    for row in range(0, rows, step):
        blocks = unpack(packed[row : row + step]).unflatten(1, (-1, BLOCK)).float()
        out[row : row + step] = (blocks * scale[row : row + step].float()[..., None]).flatten(1).bfloat16()
    return out


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """(N, K/8) int32 -> (N, K) int8 codes in -8..7."""
    import torch

    pairs = packed.contiguous().view(torch.uint8)
    codes = torch.stack([pairs & 0x0F, pairs >> 4], dim=-1).flatten(1)
    return codes.view(torch.int8) - 8


class _Int4Grid(Grid):
    """Blocks along the rows."""

    block = BLOCK
    levels = Levels(low=-8, high=7)

    def __init__(self, codec: Int4, spec: TensorSpec) -> None:
        self.codec, self.spec = codec, spec

    def scales(self, weights: torch.Tensor, curvature: Curvature) -> Scales:
        import torch

        absmax = block_absmax(weights, BLOCK)
        plain = partial(_plain_scale, absmax)
        scale = searched(self, weights, curvature, plain) if self.codec.scale == "mse" else plain(1.0)
        shape = torch.tensor(self.spec.shape, dtype=torch.int64)
        stored = {f"{self.spec.name}_scale": scale.bfloat16().cpu(), f"{self.spec.name}_shape": shape}
        return Scales(scale, stored)

    def pack(self, levels: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        import torch

        nibbles = (levels.cpu() + 8).to(torch.uint8)
        packed = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(torch.int32)
        return {f"{self.spec.name}_packed": packed} | dict(scales.stored)


def _plain_scale(absmax: torch.Tensor, factor: float) -> torch.Tensor:
    """compressed-tensors' scale for blocks cut at `factor` of absmax: fp32 values that bf16 holds, 1 for zero."""
    scale = (absmax * factor / LEVELS).bfloat16().float()
    return scale.where(scale > 0, scale.new_ones(()))


@dataclass(slots=True)
class _Int4Encoding(Encoding):
    spec: TensorSpec = None  # type: ignore[assignment]
    source: Reader = None  # type: ignore[assignment]

    def chunks(self) -> Iterator[Chunk]:
        import numpy as np
        import torch

        codec, spec = self.codec, self.spec
        assert isinstance(codec, Int4)
        rows, columns = spec.shape
        step = max(1, CHUNK_ELEMENTS // columns)
        for row in range(0, rows, step):
            stop = min(row + step, rows)
            weights = self.source.read(spec, row * columns, stop * columns).float().reshape(-1, BLOCK)
            if not bool(torch.isfinite(weights).all()):
                raise not_finite(spec, codec)
            codes, scale = _quantised(weights, SHRINK[codec.scale])
            self.quality.add(float(weights.double().square().sum()), _error(weights, codes, scale))
            nibbles = (codes.flatten() + 8).to(torch.uint8)
            packed = nibbles[0::2] | (nibbles[1::2] << 4)
            yield Chunk(f"{spec.name}_packed", row * columns // 2, packed.numpy())
            yield Chunk(f"{spec.name}_scale", row * columns // BLOCK * 2, scale.view(torch.uint8).numpy())
        yield Chunk(f"{spec.name}_shape", 0, np.array(spec.shape, np.int64).view(np.uint8))


def _quantised(weights: torch.Tensor, shrink: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (B, 32) fp32 -> codes (B, 32) and bf16 scales (B,) of least squared error among the factors."""
    import torch

    absmax = weights.abs().amax(1)
    best_codes, best_scale = _rounded(weights, absmax)
    best = (weights - best_codes * best_scale.float()[:, None]).square().sum(1)
    for factor in shrink[1:]:
        codes, scale = _rounded(weights, absmax * factor)
        error = (weights - codes * scale.float()[:, None]).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_codes = torch.where(better[:, None], codes, best_codes)
        best_scale = torch.where(better, scale, best_scale)
    return best_codes, _unshrunk(weights, best_codes, best_scale, absmax) if len(shrink) > 1 else best_scale


def _unshrunk(weights: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Scales under which a block keeps its length along its weights: sum(w * decoded) = sum(w * w).

    Least squares shrinks every block by its relative squared error (about 1 %), which would be a gain below 1 in every
    layer; taking that back costs a hundredth of the error.
    """
    import torch

    unit = weights / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # squares of weights may overflow
    along = (unit * codes).sum(1) * scale.float()
    gain = torch.where((along > 0) & (absmax <= WIDE), unit.square().sum(1) * absmax / along, 1.0)
    return (scale.float() * gain).bfloat16()


def _rounded(weights: torch.Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    scale = (top / LEVELS).bfloat16()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    low = torch.where(top > WIDE, -7.0, -8.0)[:, None]
    return torch.maximum((weights / scale.float()[:, None]).round().clamp(max=7.0), low), scale


def _error(weights: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> float:
    """Squared error of what `decode` will give."""
    decoded = (codes * scale.float()[:, None]).bfloat16()
    return float((weights - decoded.float()).double().square().sum())
