"""What a format tells other rooms of the program: forms in ONNX graphs, and snippets that open it elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

FormName = Literal["dense", "qdq", "int4", "bnb4", "dynamic"]
# How an ONNX graph carries a matrix, in words; bagel_compress.exporting.onnx_weights makes the nodes of each form.
ONNX_FORMS: dict[str, str] = {
    "dense": "plain MatMul",
    "qdq": "8-bit codes, DequantizeLinear per output channel",
    "int4": "4-bit codes, DequantizeLinear in blocks of 32",
    "bnb4": "NF4 codes, com.microsoft MatMulBnb4",
    "dynamic": "8-bit codes, MatMulInteger",
}


@dataclass(frozen=True, slots=True)
class OnnxCodes:
    """A weight (N, K) for a graph: its codes, fp32 scales, and the element type of the codes in ONNX.

    `codes` is (N, K) with one code per byte, or 1-D packed bytes for the form bnb4. `scale` is (N,) for one scale per
    row, (N, K/32) for int4, (blocks,) for bnb4.
    """

    codes: np.ndarray
    scale: torch.Tensor
    element: Literal["UINT8", "INT8", "INT4", "FLOAT8E4M3FN"]


@dataclass(frozen=True)
class Snippet:
    """Text of a model card that opens an artifact. `needs` are the packages that the text imports.

    `cuda` is set where the text cannot run without a GPU.
    """

    title: str
    text: str
    needs: tuple[str, ...]
    language: str = "python"
    note: str = ""
    cuda: bool = False


def part_note(what: str) -> str:
    """The note of a snippet that opens one tensor, such as "4-bit weight"."""
    return f"One {what}, read without decoding or quantising anything again."


def compressed_tensors_snippet(repo: str, tensor: str, shard: str, form: str, compressor: str, scheme: str) -> Snippet:
    """Opens one weight with a `compressor` of compressed-tensors; `scheme` are the arguments of QuantizationArgs."""
    text = f"""
from compressed_tensors.compressors import {compressor}
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from huggingface_hub import hf_hub_download
from safetensors import safe_open

name = "{tensor}"
with safe_open(hf_hub_download("{repo}", "{shard}"), "pt") as shard:
    found = {{key.removeprefix(name): shard.get_tensor(key) for key in shard.keys() if key.startswith(name)}}
stored = {{"weight" + suffix: tensor for suffix, tensor in found.items()}}
scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs({scheme}))
print({compressor}.decompress(stored, scheme)["weight"])
"""
    return Snippet(f"compressed-tensors ({form})", text, ("compressed_tensors",), note=part_note("weight"))
