"""int8: one scale per row, in bitsandbytes' form or in that of compressed-tensors.

Parts of `X.weight` of shape (N, K), by dialect (bitsandbytes 0.50.2, `Linear8bitLt.state_dict()`; compressed-tensors
0.20, "int-quantized"):

    both                  X.weight           I8  (N, K)    round(127 * w / SCB)
    bitsandbytes          X.SCB              F32 (N,)      the row's absmax
                          X.weight_format    U8  ()        0, which means rows
    compressed-tensors    X.weight_scale     F32 (N, 1)    SCB / 127

With scale "absmax" every byte equals what bitsandbytes makes of the row on CPU. It goes through fp16, so a weight that
fp16 cannot hold is refused here (bitsandbytes would store SCB = inf). A row of zeros has SCB 0 and codes 0. Scale "mse"
takes the SCB of least squared error among absmax and a few smaller; larger weights are clipped to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from bagel_compress.codecs.base import Chunk, Encoding, Reader, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec
from bagel_compress.codecs.compressed_tensors import DYNAMIC_TOKENS, quantization_config
from bagel_compress.codecs.grid import Curvature, Grid, Levels, Scales, searched
from bagel_compress.codecs.loaders import Loader, bitsandbytes, comfyui, compressed_tensors, vllm_omni
from bagel_compress.codecs.matrix import (
    MatrixCodec,
    absmax_words,
    check_shapes,
    memory_for_codes,
    read_rows,
    self_check,
)
from bagel_compress.codecs.traits import FormName, OnnxCodes, Snippet, compressed_tensors_snippet, part_note
from bagel_compress.errors import CodecError, ExportError
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

HALF_OVERFLOW_WORD = 0x4780  # bf16 of 65536: the first that fp16 (up to 65504) cannot hold
HALF_MAX = 65504.0
PER_127 = 7.874015718698502e-3  # 1/127 as bitsandbytes' int8_vectorwise_dequant writes it
SEARCH = tuple(1 - 0.02 * step for step in range(16))  # of absmax, itself first
DECODE_ELEMENTS = 1 << 22  # decoded at a time: bounds the fp32 temporary to 16 MB


class Int8(CalibratedCodec, MatrixCodec):
    """Symmetric int8 with one fp32 scale per output channel."""

    format: Literal["int8"] = "int8"
    scale: Literal["absmax", "mse"] = "absmax"
    dialect: Literal["bitsandbytes", "compressed-tensors"] = Field(
        default="bitsandbytes", description="whose names, scales and config.json are written; the codes are the same"
    )
    later: ClassVar[tuple[str, ...]] = ("rounding", "dialect")
    tag: ClassVar[str] = "8-bit"
    comfyui_format: ClassVar[str] = "int8_tensorwise"

    @property
    def normal_error(self) -> float:
        return 0.0087

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        (spec,) = unit.specs
        if self.dialect == "compressed-tensors":
            return {spec.name: PartSpec("I8", spec.shape), scale_name(spec): PartSpec("F32", (spec.shape[0], 1))}
        return {
            spec.name: PartSpec("I8", spec.shape),
            scb_name(spec): PartSpec("F32", spec.shape[:1]),
            f"{spec.name}_format": PartSpec("U8", ()),
        }

    def begin(self, unit: Unit, source: Reader) -> Encoding:
        return _Int8Encoding(codec=self, parts=self.parts(unit), spec=unit.specs[0], source=source)

    def grid(self, spec: TensorSpec) -> Grid:
        return _Int8Grid(self, spec)

    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """bf16(code * SCB / 127) in fp32, as `bitsandbytes.functional.int8_vectorwise_dequant` does it, then bf16.

        compressed-tensors: bf16(code * scale), the product in fp32.
        """
        (spec,) = unit.specs
        check_shapes(self, unit, parts)
        if self.dialect == "compressed-tensors":
            return {spec.name: decode_scaled(parts[spec.name], parts[scale_name(spec)])}
        if int(parts[f"{spec.name}_format"]) != 0:
            raise CodecError(f"{spec.name}: weight_format is not 0 (rows); the artifact is damaged.")
        return {spec.name: decode_rows(parts[spec.name], parts[scb_name(spec)])}

    def config(self, units: Sequence[Unit], others: Sequence[str]) -> dict[str, Any]:
        """`transformers.BitsAndBytesConfig.to_dict()`, without its private keys; or compressed-tensors' scheme W8A8."""
        if self.dialect == "compressed-tensors":
            numbers = {"num_bits": 8, "type": "int", "symmetric": True}
            weights = numbers | {"strategy": "channel", "dynamic": False}
            return quantization_config("int-quantized", weights, numbers | DYNAMIC_TOKENS, others)
        return {
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_4bit": False,
                "load_in_8bit": True,
                "llm_int8_threshold": 6.0,
                "llm_int8_has_fp16_weight": False,
                "llm_int8_enable_fp32_cpu_offload": False,
                "llm_int8_skip_modules": list(others),
            }
        }

    def linear(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> torch.nn.Module:
        from bagel_compress.codecs.int8_linear import Int8Linear, ScaledInt8Linear

        check_shapes(self, Unit(spec.name, (spec,)), parts)
        if self.dialect == "compressed-tensors":
            return ScaledInt8Linear(spec, parts[spec.name], parts[scale_name(spec)], bias, decode_scaled)
        return Int8Linear(spec, parts[spec.name], parts[scb_name(spec)], bias, decode_rows)

    def comfyui_values(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parts of dialect compressed-tensors. Raises ExportError for the other: the product rounds differently."""
        if self.dialect != "compressed-tensors":
            raise ExportError(
                f"{unit.name} has bitsandbytes' scales; a ComfyUI file needs codec "
                "{format: int8, dialect: compressed-tensors}: use recipe comfyui-int8."
            )
        return dict(parts)

    def loaders(self) -> list[Loader]:
        if self.dialect == "bitsandbytes":
            return [
                bitsandbytes("any", "tests/pipeline/test_foreign.py::test_bitsandbytes_loads_int8"),
                vllm_omni("its bitsandbytes method quantises at load and reads no stored codes"),
            ]
        return [
            compressed_tensors("RTX 20 and up"),
            comfyui("RTX 20 and up"),
        ]

    def snippets(self, repo: str, tensor: str, shard: str, alone: bool) -> list[Snippet]:
        if self.dialect == "compressed-tensors":
            scheme = 'num_bits=8, type="int", strategy="channel"'
            return [compressed_tensors_snippet(repo, tensor, shard, self.format, "IntQuantizationCompressor", scheme)]
        text = f"""
import bitsandbytes as bnb
from huggingface_hub import hf_hub_download
from safetensors import safe_open

name = "{tensor}"
with safe_open(hf_hub_download("{repo}", "{shard}"), "pt") as shard:
    codes, scale = shard.get_tensor(name), shard.get_tensor(name.removesuffix("weight") + "SCB")
layer = bnb.nn.Linear8bitLt(codes.shape[1], codes.shape[0], bias=False, has_fp16_weights=False, device="meta")
layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
print(layer)
"""
        return [Snippet("bitsandbytes", text, ("bitsandbytes",), note=part_note("8-bit layer"))]

    def onnx_form(self, tensor: str, runtime: str, activations: str) -> FormName:
        return "dynamic" if activations == "dynamic" else "qdq"

    def onnx_codes(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> OnnxCodes:
        """Codes (N, K) and scales (N,); bitsandbytes stores 127 times the scale."""
        if self.dialect == "compressed-tensors":
            return OnnxCodes(parts[spec.name].numpy(), parts[scale_name(spec)].reshape(-1), "INT8")
        return OnnxCodes(parts[spec.name].numpy(), parts[scb_name(spec)].float() * PER_127, "INT8")


def decode_rows(codes: torch.Tensor, scb: torch.Tensor) -> torch.Tensor:
    """(N, K) int8 and (N,) fp32 -> (N, K) bf16."""
    import torch

    out = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    step = max(1, DECODE_ELEMENTS // codes.shape[1])
    for first in range(0, codes.shape[0], step):
        rows = slice(first, first + step)
        out[rows] = codes[rows] * scb[rows, None] * PER_127
    return out


def decode_scaled(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(N, K) int8 and (N, 1) fp32 -> (N, K) bf16."""
    import torch

    out = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    step = max(1, DECODE_ELEMENTS // codes.shape[1])
    for first in range(0, codes.shape[0], step):
        rows = slice(first, first + step)
        out[rows] = codes[rows] * scale[rows]
    return out


def scale_name(spec: TensorSpec) -> str:
    return f"{spec.name}_scale"


def scb_name(spec: TensorSpec) -> str:
    return f"{spec.name.removesuffix('weight')}SCB"


class _Int8Grid(Grid):
    """One scale per row. A row of zeros has SCB 1 here: decoded like nearest rounding's 0, and no divisor to avoid."""

    levels = Levels(low=-127, high=127)

    def __init__(self, codec: Int8, spec: TensorSpec) -> None:
        self.codec, self.spec, self.block = codec, spec, spec.shape[1]
        self.factor = PER_127 if codec.dialect == "bitsandbytes" else 1.0

    def scales(self, weights: torch.Tensor, curvature: Curvature) -> Scales:
        import torch

        absmax = weights.abs().amax(1, keepdim=True)
        if float(absmax.max()) > HALF_MAX:
            raise _too_large(self.spec)
        absmax = absmax.where(absmax > 0, absmax.new_ones(()))
        searching = self.codec.scale == "mse"
        unit = 1.0 if self.codec.dialect == "bitsandbytes" else PER_127
        plain = absmax * unit
        scale = searched(self, weights, curvature, lambda factor: plain * factor) if searching else plain
        if self.codec.dialect == "compressed-tensors":
            return Scales(scale, {scale_name(self.spec): scale.cpu()})
        kind = torch.zeros((), dtype=torch.uint8)
        return Scales(scale, {scb_name(self.spec): scale.cpu().reshape(-1), f"{self.spec.name}_format": kind})

    def pack(self, levels: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        import torch

        return {self.spec.name: levels.cpu().contiguous().to(torch.int8)} | dict(scales.stored)


def _too_large(spec: TensorSpec) -> CodecError:
    return CodecError(
        f"{spec.name}: holds a weight over 65504, the largest fp16 number, and int8 goes through fp16; "
        "give this tensor codec fp8 or raw."
    )


@dataclass(slots=True, kw_only=True)
class _Int8Encoding(Encoding):
    codec: Int8
    spec: TensorSpec
    source: Reader

    def chunks(self) -> Iterator[Chunk]:
        import numpy as np

        from bagel_compress.codecs.kernels.rows_kernels import int8_rows
        from bagel_compress.codecs.kernels.threads import split

        spec, columns = self.spec, self.spec.shape[1]
        for first, words in read_rows(self.source, spec):
            codes = memory_for_codes(*words.shape).view(np.int8)
            scb = self._scales(words)
            sums = np.empty((len(words), 3), np.float32)
            split(lambda a, b: int8_rows(words[a:b], scb[a:b], codes[a:b], sums[a:b]), len(words), 1)  # noqa: B023
            self_check(spec, self.codec, not sums[:, 2].any())
            self.quality.add(*sums[:, :2].sum(0, dtype=np.float64).tolist())
            yield Chunk(spec.name, first * columns, codes.reshape(-1).view(np.uint8), given=True)
            if self.codec.dialect == "compressed-tensors":
                yield Chunk(scale_name(spec), first * 4, (scb * np.float32(PER_127)).view(np.uint8))
            else:
                yield Chunk(scb_name(spec), first * 4, scb.view(np.uint8))
        if self.codec.dialect == "bitsandbytes":
            yield Chunk(f"{spec.name}_format", 0, np.zeros(1, np.uint8))

    def _scales(self, words: np.ndarray) -> np.ndarray:
        """(R,) fp32: SCB of each row."""
        import numpy as np

        from bagel_compress.codecs.kernels.rows_kernels import half_of, int8_search
        from bagel_compress.codecs.kernels.threads import split

        tops = absmax_words(words, self.spec, self.codec)
        if (tops >= HALF_OVERFLOW_WORD).any():
            raise _too_large(self.spec)
        scb = np.array([half_of(top) for top in tops], np.float32)
        if self.codec.scale == "absmax":
            return scb
        tried = scb[:, None] * np.array(SEARCH, np.float32)
        noise = np.empty(tried.shape, np.float32)
        split(lambda a, b: int8_search(words[a:b], tried[a:b], noise[a:b]), len(words), 1)
        return np.take_along_axis(tried, noise.argmin(1)[:, None], 1)[:, 0].copy()
