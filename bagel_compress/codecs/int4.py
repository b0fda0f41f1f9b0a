"""int4: signed four-bit codes, one bf16 scale per block of a row: compressed-tensors' "pack-quantized" W4A16.

Parts of `X.weight` of shape (N, K), K a multiple of the group G, which is 32, 64 or 128 (compressed-tensors 0.20,
`pack_to_int32`):

    X.weight_packed        I32  (N, K/8)            eight codes a word, first in the lowest bits, stored as code + 8
    X.weight_scale         BF16 (N, K/G)
    X.weight_shape         I64  (2,)                N, K
    X.weight_zero_point    I32  (ceil(N/8), K/G)    asymmetric only: of eight rows in a word, stored as code + 8

Dialect auto-round holds the same codes in the layout of codecs/int4_auto_round.py.

With group 32 and symmetric it is the format of TensorRT and of standard ONNX for four bits (DequantizeLinear with
blocks of 32); NF4 is closer to the weights at the same size, but has no operator there. vLLM's kernels take all groups.
Scale "absmax" is compressed-tensors' own rule, absmax / 7.5; "mse" tries smaller ones and keeps what leaves the least
squared error in each block, then takes back by how much that shrank the block. Codes are rounded with the bf16 scale
that is stored, or was found. Zero blocks get the scale 1. Asymmetric blocks reach from their least to their largest
weight, 0 included, in 15 steps: weight = (code - zero point) * scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pydantic import Field, model_validator

from bagel_compress.codecs.base import Chunk, Encoding, Reader, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec
from bagel_compress.codecs.compressed_tensors import quantization_config
from bagel_compress.codecs.constants import INT4_WIDE
from bagel_compress.codecs.grid import Curvature, Grid, Levels, Scales, block_absmax, searched
from bagel_compress.codecs.int4_auto_round import (
    PER_WORD,
    TransposedEncoding,
    TransposedGrid,
    by_rows,
    reader_config,
    stored_parts,
)
from bagel_compress.codecs.int4_search import CHUNK_ELEMENTS, LEVELS, SearchedEncoding
from bagel_compress.codecs.loaders import TWO_STAGES, Loader, compressed_tensors, vllm_omni
from bagel_compress.codecs.matrix import (
    INFINITY_WORD,
    MatrixCodec,
    as_floats,
    check_shapes,
    not_finite,
    read_rows,
    self_check,
)
from bagel_compress.codecs.traits import FormName, OnnxCodes, Snippet, compressed_tensors_snippet
from bagel_compress.errors import CodecError, ExportError, PlanError
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

BLOCK: Final = 32  # weights per scale, unless a recipe says otherwise
# Relative errors of normal weights by group: absmax, searched scales, zero points.
NORMAL_ERRORS = {32: (0.095, 0.088, 0.081), 64: (0.103, 0.096, 0.091), 128: (0.111, 0.102, 0.101)}


class Int4(CalibratedCodec, MatrixCodec):
    """INT4 in blocks along the input."""

    format: Literal["int4"] = "int4"
    scale: Literal["absmax", "mse"] = "absmax"
    group: Literal[32, 64, 128] = Field(default=BLOCK, description="weights per scale")
    symmetric: bool = Field(default=True, description="false: a zero point per group")
    dialect: Literal["compressed-tensors", "auto-round"] = Field(
        default="compressed-tensors", description="whose layout and config.json are written; the codes are the same"
    )
    later: ClassVar[tuple[str, ...]] = ("rounding", "group", "symmetric", "dialect")
    tag: ClassVar[str] = "4-bit"

    @property
    def normal_error(self) -> float:
        return NORMAL_ERRORS[self.group][2 if not self.symmetric else self.scale == "mse"]

    @property
    def served(self) -> bool:
        return self.dialect == "auto-round"

    @model_validator(mode="after")
    def _symmetric_where_needed(self) -> Int4:
        if not self.symmetric and (self.scale != "absmax" or self.calibrated):
            raise ValueError("codec int4 with symmetric: false has scale absmax and rounding nearest only")
        if not self.symmetric and self.dialect == "auto-round":
            raise ValueError("codec int4 with dialect auto-round has no zero points; leave symmetric out")
        return self

    def check(self, unit: Unit) -> None:
        super().check(unit)
        for spec in unit.specs:
            if spec.shape[1] % self.group:
                raise PlanError(
                    f"{spec.name}: codec int4 needs rows of a multiple of {self.group} weights, found {spec.shape[1]};"
                    " give it a smaller group, codec int8 or raw in the recipe."
                )
            if self.dialect == "auto-round" and spec.shape[0] % PER_WORD:
                raise PlanError(
                    f"{spec.name}: codec int4 with dialect auto-round needs a multiple of {PER_WORD} rows, found "
                    f"{spec.shape[0]}; give it codec raw in the recipe."
                )

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        (spec,) = unit.specs
        return stored_parts(spec, self.group) if self.dialect == "auto-round" else self._parts_by_rows(spec)

    def _parts_by_rows(self, spec: TensorSpec) -> dict[str, PartSpec]:
        rows, columns = spec.shape
        parts = {
            f"{spec.name}_packed": PartSpec("I32", (rows, columns // 8)),
            f"{spec.name}_scale": PartSpec("BF16", (rows, columns // self.group)),
            f"{spec.name}_shape": PartSpec("I64", (2,)),
        }
        if not self.symmetric:
            parts[zero_name(spec)] = PartSpec("I32", (-(-rows // 8), columns // self.group))
        return parts

    def begin(self, unit: Unit, source: Reader) -> Encoding:
        (spec,) = unit.specs
        parts = self._parts_by_rows(spec)
        found: Encoding = (
            _Int4Encoding(codec=self, parts=parts, spec=spec, source=source)
            if self.scale == "absmax"
            else SearchedEncoding(codec=self, parts=parts, spec=spec, source=source, group=self.group)
        )
        if self.dialect == "compressed-tensors":
            return found
        return TransposedEncoding(codec=self, parts=self.parts(unit), spec=spec, inner=found)

    def grid(self, spec: TensorSpec) -> Grid:
        grid = _Int4Grid(self, spec)
        return TransposedGrid(grid, spec) if self.dialect == "auto-round" else grid

    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """bf16((code - zero point) * scale), the product in fp32."""
        (spec,) = unit.specs
        self._check(spec, parts)
        if self.dialect == "auto-round":
            return {spec.name: decode_codes(*by_rows(spec, parts))}
        packed, scale = parts[f"{spec.name}_packed"], parts[f"{spec.name}_scale"]
        zeros = None if self.symmetric else unpack(parts[zero_name(spec)].t()).t()[: spec.shape[0]]
        return {spec.name: decode_codes(packed, scale, zeros)}

    def linear(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> torch.nn.Module:
        if not self.symmetric or self.dialect == "auto-round":
            return super().linear(spec, parts, bias)
        from bagel_compress.codecs.int4_linear import Int4Linear

        check_shapes(self, Unit(spec.name, (spec,)), parts)
        return Int4Linear(spec, parts[f"{spec.name}_packed"], parts[f"{spec.name}_scale"], bias, decode_codes)

    def config(self, units: Sequence[Unit], others: Sequence[str]) -> dict[str, Any]:
        if self.dialect == "auto-round":
            return reader_config(self.group, units, others)
        weights = {"num_bits": 4, "type": "int", "symmetric": self.symmetric, "strategy": "group", "dynamic": False}
        return quantization_config("pack-quantized", weights | {"group_size": self.group}, None, others)

    def loaders(self) -> list[Loader]:
        if self.dialect == "auto-round":
            return [vllm_omni(), TWO_STAGES]
        return [
            compressed_tensors("any"),
            vllm_omni("Unknown quantization method: 'compressed_tensors'"),
            TWO_STAGES,
        ]

    def snippets(self, repo: str, tensor: str, shard: str, alone: bool) -> list[Snippet]:
        if self.dialect == "auto-round":
            return []
        scheme = f'num_bits=4, type="int", strategy="group", group_size={self.group}, symmetric={self.symmetric}'
        return [compressed_tensors_snippet(repo, tensor, shard, self.format, "PackedQuantizationCompressor", scheme)]

    def onnx_form(self, tensor: str, runtime: str, activations: str) -> FormName:
        if self.group != BLOCK or not self.symmetric or self.dialect == "auto-round":
            raise ExportError(
                f"{tensor}: exports carry int4 with group {BLOCK}, symmetric, in compressed-tensors' dialect; "
                "compress it that way."
            )
        return "int4"

    def onnx_codes(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> OnnxCodes:
        """Codes -8..7 (N, K) and scales (N, K/32)."""
        return OnnxCodes(unpack(parts[f"{spec.name}_packed"]).numpy(), parts[f"{spec.name}_scale"].float(), "INT4")

    def _check(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> None:
        check_shapes(self, Unit(spec.name, (spec,)), parts)
        if self.dialect == "auto-round":
            return
        shape = tuple(parts[f"{spec.name}_shape"].tolist())
        if shape != spec.shape:
            raise CodecError(f"{spec.name}: weight_shape says {shape}, expected {spec.shape}; the artifact is damaged.")


def zero_name(spec: TensorSpec) -> str:
    return f"{spec.name}_zero_point"


def decode_codes(packed: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """(N, K/8) int32, (N, K/G) bf16 and zero points (N, K/G) int8 -> (N, K) bf16; the product in fp32."""
    import torch

    from bagel_compress.codecs.linears import is_fake

    rows, columns = packed.shape[0], packed.shape[1] * 8
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=packed.device)
    step = max(1, CHUNK_ELEMENTS // columns)
    # The pieces of fake tensors are alike: one shows the memory that all take in turn.
    for row in range(0, step if is_fake(packed) else rows, step):
        part = slice(row, row + step)
        blocks = unpack(packed[part]).unflatten(1, (scale.shape[1], -1)).float()
        if zeros is not None:
            blocks -= zeros[part, :, None]
        out[part] = (blocks * scale[part].float()[..., None]).flatten(1).bfloat16()
    return out


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """(N, K/8) int32 -> (N, K) int8 codes in -8..7."""
    import torch

    pairs = packed.reshape(-1).view(torch.uint8).reshape(packed.shape[0], -1)
    codes = torch.stack([pairs & 0x0F, pairs >> 4], dim=-1).flatten(1)
    return codes.view(torch.int8) - 8


class _Int4Grid(Grid):
    """Blocks along the rows."""

    levels = Levels(low=-8, high=7)

    def __init__(self, codec: Int4, spec: TensorSpec) -> None:
        self.codec, self.spec, self.block = codec, spec, codec.group

    def scales(self, weights: torch.Tensor, curvature: Curvature) -> Scales:
        import torch

        absmax = block_absmax(weights, self.block)
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


@cache
def _scale_of_word() -> np.ndarray:
    """`_plain_scale` of every finite bf16 magnitude, by its word."""
    import numpy as np
    import torch

    found: np.ndarray = _plain_scale(
        torch.from_numpy(as_floats(np.arange(INFINITY_WORD, dtype=np.uint16))), 1.0
    ).numpy()
    return found


@dataclass(slots=True, kw_only=True)
class _Int4Encoding(Encoding):
    """Scales by rule."""

    codec: Int4
    spec: TensorSpec
    source: Reader

    def chunks(self) -> Iterator[Chunk]:
        import numpy as np

        codec, spec = self.codec, self.spec
        columns, blocks, all_zeros = spec.shape[1], spec.shape[1] // codec.group, []
        packed = np.empty((0, columns // 2), np.uint8)
        for first, words in read_rows(self.source, spec):
            packed = (
                np.empty((len(words), columns // 2), np.uint8) if len(packed) < len(words) else packed[: len(words)]
            )
            scales, zeros = self._coded(words, packed)
            all_zeros.append(zeros)
            yield Chunk(f"{spec.name}_packed", first * columns // 2, packed.reshape(-1))
            stored = (scales.view(np.uint32) >> 16).astype(np.uint16)
            yield Chunk(f"{spec.name}_scale", first * blocks * 2, stored.reshape(-1).view(np.uint8))
        yield Chunk(f"{spec.name}_shape", 0, np.array(spec.shape, np.int64).view(np.uint8))
        if not codec.symmetric:
            yield Chunk(zero_name(spec), 0, packed_zeros(np.concatenate(all_zeros)).reshape(-1).view(np.uint8))

    def _coded(self, words: np.ndarray, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fills `packed`; returns scales (R, B) fp32 and zero points (R, B) int8."""
        import numpy as np

        from bagel_compress.codecs.kernels.int4_kernels import int4_blocks
        from bagel_compress.codecs.kernels.threads import split

        scales, zeros, bottoms = self._scales(words)
        sums = np.empty((len(words), 3))

        def part(a: int, b: int) -> None:
            int4_blocks(words[a:b], self.codec.group, scales[a:b], zeros[a:b], bottoms[a:b], packed[a:b], sums[a:b])

        split(part, len(words), 1)
        self_check(self.spec, self.codec, not sums[:, 2].any())
        self.quality.add(*sums[:, :2].sum(0).tolist())
        return scales, zeros.astype(np.int8)

    def _scales(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scales that bf16 holds, zero points and lowest codes, (R, K / group) fp32 each, or (0, 0): 0 and -8."""
        return self._plain(words) if self.codec.symmetric else self._asymmetric(words)

    def _plain(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        import numpy as np

        from bagel_compress.codecs.kernels.block_kernels import absmax_blocks
        from bagel_compress.codecs.kernels.threads import split

        group = self.codec.group
        tops = np.empty((len(words), words.shape[1] // group), np.uint16)
        split(lambda a, b: absmax_blocks(words[a:b], group, tops[a:b]), len(words), 1)
        absmax = self._finite(tops)
        scales = _scale_of_word()[tops]  # no torch between kernels: its idle threads spin on the cores that they need
        wide = absmax > np.float32(INT4_WIDE)
        return scales, _none(), np.where(wide, np.float32(-7), np.float32(-8)) if wide.any() else _none()

    def _asymmetric(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        import numpy as np

        from bagel_compress.codecs.kernels.int4_kernels import asymmetric_blocks
        from bagel_compress.codecs.kernels.threads import split

        shape = (len(words), words.shape[1] // self.codec.group)
        scales, zeros, tops = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, np.uint16)

        def part(a: int, b: int) -> None:
            asymmetric_blocks(words[a:b], self.codec.group, scales[a:b], zeros[a:b], tops[a:b])

        split(part, len(words), 1)
        self._finite(tops)
        return scales, zeros, _none()

    def _finite(self, tops: np.ndarray) -> np.ndarray:
        """Largest magnitudes as values, from their words. Raises CodecError on NaN and Inf."""
        if (tops >= INFINITY_WORD).any():
            raise not_finite(self.spec, self.codec)
        return as_floats(tops)


def _none() -> np.ndarray:
    import numpy as np

    return np.empty((0, 0), np.float32)


def packed_zeros(zeros: np.ndarray) -> np.ndarray:
    """(N, B) int8 zero points -> (ceil(N/8), B) int32: of eight rows in a word, the first in the lowest bits."""
    import numpy as np

    rows, blocks = zeros.shape
    codes = np.zeros((-(-rows // 8), 8, blocks), np.uint32)
    codes.reshape(-1, blocks)[:rows] = zeros.astype(np.int32) + 8
    shifted: np.ndarray = codes << (4 * np.arange(8, dtype=np.uint32))[None, :, None]
    return np.bitwise_or.reduce(shifted, 1).view(np.int32)
