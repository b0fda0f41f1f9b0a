"""fp8: e4m3fn weights with a bf16 scale, as compressed-tensors' "float-quantized" stores them.

Parts of `X.weight` of shape (N, K):

    X.weight          F8_E4M3 (N, K)
    X.weight_scale    BF16    (N, 1) with granularity "channel", (1,) with "tensor"
                      F32     ()     in dialect "vllm", which has granularity "tensor": `quant_method: fp8`

The scale is absmax/448 rounded to bf16 before anything is coded with it; codes are w/scale in fp32, rounded to nearest
even, clamped to +-448. Decoding is compressed-tensors' own: bf16(code) * scale, rounded to bf16. A row of zeros has
scale 1. Scale "mse" takes the scale of least squared error among a few around absmax/448.

ComfyUI's "fp8 scaled" files hold the same weights of granularity "tensor" under the same names, with an fp32 scalar
for a scale: `comfyui_values`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from bagel_compress.codecs.base import Chunk, Encoding, Reader, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec
from bagel_compress.codecs.compressed_tensors import DYNAMIC_TOKENS, quantization_config
from bagel_compress.codecs.constants import FP8_MAX
from bagel_compress.codecs.grid import Curvature, Grid, Levels, Scales, searched
from bagel_compress.codecs.loaders import TWO_STAGES, Loader, comfyui, compressed_tensors, vllm_omni
from bagel_compress.codecs.matrix import (
    MatrixCodec,
    absmax_words,
    as_floats,
    check_shapes,
    memory_for_codes,
    read_rows,
    self_check,
)
from bagel_compress.codecs.traits import FormName, OnnxCodes, Snippet, compressed_tensors_snippet
from bagel_compress.errors import ExportError
from bagel_compress.io import bf16
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

# Words of the smallest normal bf16 number (scales below are too coarse to bring absmax under 448) and of the largest
# scale whose 448-fold is a bf16 number: 3.3895e38 / 448, rounded down.
SCALE_WORDS = (0x0080, 0x7B11)
SEARCH = (0, *range(-40, 0, 8), *range(8, 96, 8))  # bf16 words from absmax/448: about 0.7 to 1.7 of it, itself first


class Fp8(CalibratedCodec, MatrixCodec):
    """e4m3fn with one scale per output channel or per tensor."""

    format: Literal["fp8"] = "fp8"
    granularity: Literal["channel", "tensor"] = "channel"
    scale: Literal["absmax", "mse"] = "absmax"
    dialect: Literal["compressed-tensors", "vllm"] = Field(
        default="compressed-tensors", description="whose scales and config.json are written; the codes are the same"
    )
    later: ClassVar[tuple[str, ...]] = ("rounding", "dialect")
    tag: ClassVar[str] = "8-bit"
    comfyui_format: ClassVar[str] = "float8_e4m3fn"
    least_capability: ClassVar[int] = 89  # Ada

    @property
    def normal_error(self) -> float:
        return 0.0258 if self.scale == "mse" and self.granularity == "channel" else 0.0265

    @property
    def served(self) -> bool:
        return self.dialect == "vllm"

    @model_validator(mode="after")
    def _one_scale_where_needed(self) -> Fp8:
        if self.dialect == "vllm" and self.granularity != "tensor":
            raise ValueError("codec fp8 with dialect vllm has one scale per weight; add granularity: tensor")
        return self

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        (spec,) = unit.specs
        shape = (spec.shape[0], 1) if self.granularity == "channel" else (1,)
        scale = PartSpec("F32", ()) if self.dialect == "vllm" else PartSpec("BF16", shape)
        return {spec.name: PartSpec("F8_E4M3", spec.shape), scale_name(spec): scale}

    def begin(self, unit: Unit, source: Reader) -> Encoding:
        return _Fp8Encoding(codec=self, parts=self.parts(unit), spec=unit.specs[0], source=source)

    def grid(self, spec: TensorSpec) -> Grid:
        return _Fp8Grid(self, spec)

    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """bf16(code) * scale, in bf16: `compressed_tensors.quantization.dequantize`, bit for bit."""
        (spec,) = unit.specs
        check_shapes(self, unit, parts)
        return {spec.name: decode_codes(parts[spec.name], parts[scale_name(spec)])}

    def config(self, units: Sequence[Unit], others: Sequence[str]) -> dict[str, Any]:
        """These weights, activations to e4m3fn as they come: by token, or in dialect vllm as vLLM does it.

        vLLM-Omni puts `bagel.` before the names of modules, and takes codes for full-precision weights unless
        `is_checkpoint_fp8_serialized` is there; vLLM itself does not look for it.
        """
        if self.dialect == "vllm":
            entry = {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "is_checkpoint_fp8_serialized": True,
                "ignored_layers": [*others, *(f"bagel.{name}" for name in others)],
            }
            return {"quantization_config": entry}
        numbers = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = numbers | {"strategy": self.granularity, "dynamic": False}
        return quantization_config("float-quantized", weights, numbers | DYNAMIC_TOKENS, others)

    def linear(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> torch.nn.Module:
        from bagel_compress.codecs.fp8_linear import Fp8Linear

        check_shapes(self, Unit(spec.name, (spec,)), parts)
        return Fp8Linear(spec, parts[spec.name], parts[scale_name(spec)], bias, decode_codes)

    def loaders(self) -> list[Loader]:
        rows = [comfyui("RTX 40 and up")]
        if self.dialect == "vllm":
            return [*rows, vllm_omni(), TWO_STAGES]
        own = compressed_tensors("RTX 40 and up")
        refused = vllm_omni("Unknown quantization method: 'compressed_tensors'")
        return [own, *(rows if self.granularity == "tensor" else []), refused]

    def snippets(self, repo: str, tensor: str, shard: str, alone: bool) -> list[Snippet]:
        if self.dialect == "vllm":
            return [_comfyui_snippet(repo)] if alone else []
        scheme = f'num_bits=8, type="float", strategy="{self.granularity}"'
        compressor = "FloatQuantizationCompressor"
        found = [compressed_tensors_snippet(repo, tensor, shard, self.format, compressor, scheme)]
        if alone and self.granularity == "tensor":
            found.append(_comfyui_snippet(repo))
        return found

    def comfyui_values(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The codes, and the scale as an fp32 scalar. Raises ExportError for a scale per channel."""
        (spec,) = unit.specs
        if self.granularity != "tensor":
            raise ExportError(
                f"{spec.name}: ComfyUI reads one scale per tensor, this artifact has one per channel; "
                "compress with codec {format: fp8, granularity: tensor}."
            )
        return dict(parts) | {scale_name(spec): parts[scale_name(spec)].float().reshape(())}

    def onnx_form(self, tensor: str, runtime: str, activations: str) -> FormName:
        return "qdq"

    def onnx_codes(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> OnnxCodes:
        """Codes (N, K) as bytes and scales (N,); a scale per tensor is repeated."""
        import torch

        scale = parts[scale_name(spec)].float().reshape(-1)
        return OnnxCodes(parts[spec.name].view(torch.uint8).numpy(), scale.expand(spec.shape[0]), "FLOAT8E4M3FN")


def decode_codes(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(N, K) e4m3fn and scales that bf16 holds, (N, 1), (1,) or () -> (N, K) bf16."""
    return codes.bfloat16().mul_(scale.bfloat16())


def scale_name(spec: TensorSpec) -> str:
    return f"{spec.name}_scale"


def _comfyui_snippet(repo: str) -> Snippet:
    text = f"""
from pathlib import Path
from bagel_compress.build.comfyui_file import comfyui_file
from bagel_compress.run.fetch import open_artifact

comfyui_file(open_artifact("{repo}"), Path("{repo.partition("/")[2]}_fp8_e4m3fn_scaled.safetensors"))
"""
    return Snippet("ComfyUI", text, (), note="Writes the single `fp8_scaled` file that ComfyUI's loaders read.")


class _Fp8Grid(Grid):
    """One scale per row, or one for all."""

    levels = Levels(low=-FP8_MAX, high=FP8_MAX, mantissa=3, smallest=2.0**-6)

    def __init__(self, codec: Fp8, spec: TensorSpec) -> None:
        self.codec, self.spec, self.block = codec, spec, spec.shape[1]

    def scales(self, weights: torch.Tensor, curvature: Curvature) -> Scales:
        absmax = weights.abs().amax(1, keepdim=True)
        if self.codec.granularity == "tensor":
            absmax = absmax.amax(0, keepdim=True)
        plain = partial(_plain_scale, absmax)
        scale = searched(self, weights, curvature, plain) if self.codec.scale == "mse" else plain(1.0)
        shape = self.codec.parts(Unit(self.spec.name, (self.spec,)))[scale_name(self.spec)].shape
        kept = scale.float() if self.codec.dialect == "vllm" else scale.bfloat16()
        return Scales(scale, {scale_name(self.spec): kept.cpu().reshape(shape)})

    def pack(self, levels: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        import torch

        return {self.spec.name: levels.cpu().contiguous().to(torch.float8_e4m3fn)} | dict(scales.stored)


def _plain_scale(absmax: torch.Tensor, factor: float) -> torch.Tensor:
    """absmax / 448 cut at `factor` of absmax: fp32 values that bf16 holds, 1 for zero."""
    import torch

    low, high = (torch.tensor(word, dtype=torch.int16).view(torch.bfloat16).float() for word in SCALE_WORDS)
    scale = (absmax * factor / FP8_MAX).bfloat16().float().clamp(float(low), float(high))
    return scale.where(absmax > 0, scale.new_ones(()))


@dataclass(slots=True, kw_only=True)
class _Fp8Encoding(Encoding):
    codec: Fp8
    spec: TensorSpec
    source: Reader

    def chunks(self) -> Iterator[Chunk]:
        import numpy as np

        from bagel_compress.codecs.kernels.rows_kernels import fp8_rows
        from bagel_compress.codecs.kernels.threads import split

        spec, columns = self.spec, self.spec.shape[1]
        whole = self._tensor_scale() if self.codec.granularity == "tensor" else None
        for first, words in read_rows(self.source, spec):
            codes = memory_for_codes(*words.shape)
            scales = self._channel_scales(words) if whole is None else np.full(len(words), whole, np.float32)
            sums = np.empty((len(words), 3), np.float32)
            split(lambda a, b: fp8_rows(words[a:b], scales[a:b], codes[a:b], sums[a:b]), len(words), 1)  # noqa: B023
            self_check(spec, self.codec, not sums[:, 2].any())
            energy = sums[:, :2].astype(np.float64) * scales.astype(np.float64)[:, None] ** 2
            self.quality.add(*energy.sum(0).tolist())
            yield Chunk(spec.name, first * columns, codes.reshape(-1), given=True)
            if whole is None:
                yield Chunk(scale_name(spec), first * 2, bf16.rounded(scales).view(np.uint8))
        if whole is not None:
            value = np.array([whole], np.float32)
            stored = value if self.codec.dialect == "vllm" else bf16.rounded(value)
            yield Chunk(scale_name(spec), 0, stored.view(np.uint8))

    def _channel_scales(self, words: np.ndarray) -> np.ndarray:
        """(R,) fp32 values that bf16 can hold."""
        import numpy as np

        scales = _absmax_scales(absmax_words(words, self.spec, self.codec))
        if self.codec.scale == "absmax":
            return scales
        tried = _candidates(scales)
        best = _noise(words, tried).argmin(1)[:, None]
        return np.take_along_axis(tried, best, 1)[:, 0].copy()

    def _tensor_scale(self) -> np.float32:
        """Reads the tensor once for its absmax, and once more to search."""
        import numpy as np

        tops = [absmax_words(words, self.spec, self.codec).max() for _, words in read_rows(self.source, self.spec)]
        scale = _absmax_scales(np.array([max(tops)], np.uint16))
        if self.codec.scale == "absmax":
            return np.float32(scale[0])
        tried, noise = _candidates(scale), np.zeros(len(SEARCH))
        for _, words in read_rows(self.source, self.spec):
            noise += _noise(words, np.repeat(tried, len(words), 0)).sum(0, dtype=np.float64)
        return np.float32(tried[0, noise.argmin()])


def _absmax_scales(tops: np.ndarray) -> np.ndarray:
    """absmax words -> absmax/448 as bf16 can hold it, 1 for zero."""
    import numpy as np

    words = bf16.rounded(as_floats(tops) / np.float32(FP8_MAX)).clip(*SCALE_WORDS)
    return np.where(tops == 0, np.float32(1), as_floats(words))


def _candidates(scales: np.ndarray) -> np.ndarray:
    """(R, len(SEARCH)) scales around those given."""
    import numpy as np

    tried = bf16.rounded(scales).astype(np.int32)[:, None] + np.array(SEARCH)
    return as_floats(tried.clip(*SCALE_WORDS).astype(np.uint16))


def _noise(words: np.ndarray, tried: np.ndarray) -> np.ndarray:
    import numpy as np

    from bagel_compress.codecs.kernels.rows_kernels import fp8_search
    from bagel_compress.codecs.kernels.threads import split

    noise = np.empty(tried.shape, np.float64)
    split(lambda a, b: fp8_search(words[a:b], tried[a:b], noise[a:b]), len(words), 1)
    return noise
