"""The `export` section of a target: runtime, precision and sizes of graphs and engines. No torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from bagel_compress.io.yaml_model import FrozenModel

Runtime = Literal["onnxruntime", "tensorrt-rtx", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16"]
BlockKind = Literal[
    "embed", "vit", "latent_in", "latent_out", "lm_head", "und_layer", "gen_layer", "vae_encoder", "vae_decoder"
]
TORCH_NAMES: dict[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Range(FrozenModel):
    """The range of a symbolic axis: an engine is built for sizes from `min` to `max` and tuned for `opt`."""

    min: int = Field(ge=0)
    opt: int = Field(ge=0)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"sizes are {self.min}, {self.opt}, {self.max}, expected min <= opt <= max")
        return self


class ExportSettings(FrozenModel):
    """Settings of an export."""

    runtime: Runtime = "onnxruntime"
    precision: Precision = Field("fp32", description="of activations, caches and uncompressed weights")
    provider: Literal["cpu", "cuda"] = Field("cpu", description="onnxruntime: where the sampler runs")
    activations: Literal["float", "blocks", "dynamic"] = Field(
        "float",
        description="onnxruntime on CPU, with int8 or int4 weights: float multiplies in the export's precision; blocks"
        " rounds each row to 8 bits in blocks of 32; dynamic rounds to 8 bits with one scale for all rows (int8 only)",
    )
    blocks: tuple[BlockKind, ...] = Field((), description="kinds of blocks to export; empty: all, as a sampler needs")
    capabilities: tuple[str, ...] = Field((), description="tensorrt: compute capabilities of an engine, such as sm89")
    axes: dict[str, Range] = Field(default_factory=dict, description="tensorrt: sizes of each symbolic axis")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.activations == "dynamic" and (self.runtime != "onnxruntime" or self.precision != "fp32"):
            raise ValueError("activations: dynamic needs runtime onnxruntime and precision fp32; use float or blocks")
        if self.runtime != "onnxruntime" and self.precision == "fp32":
            raise ValueError("precision is fp32, but TensorRT's Attention runs in fp16 or bf16; choose one of them")
        return self
