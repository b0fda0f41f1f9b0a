"""Writes an artifact as the single file that ComfyUI's loaders read.

The tensors are those of the codecs (`Codec.comfyui_values`), and the file's metadata lists the layers that are not full
precision (QUANTIZATION.md of Comfy-Org/ComfyUI, format_version 1.0). An artifact without such layers, or one that is
decoded for it, gets the metadata `comfyui_bagel` instead, by which the ComfyUI-BAGEL nodes (their rewrite of 2026) open
one bf16 file; they refuse files with quantised layers. Units are converted one at a time. The VAE is not part of the
file; ComfyUI loads it apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bagel_compress.build.artifact import Artifact
from bagel_compress.codecs.base import TORCH_DTYPES, Unit, dtype_code
from bagel_compress.errors import ExportError
from bagel_compress.io.atomic import atomic_file
from bagel_compress.io.safetensors_file import lay_out
from bagel_compress.io.tensor_spec import PartSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

CHUNK = 8 << 20  # bytes per write
CONFIG_FILES = ("llm_config.json", "vit_config.json")


def comfyui_file(artifact: Artifact, out: Path, decoded: bool = False) -> int:
    """Writes the file and returns its size in bytes. With `decoded`, every weight is decoded to bf16.

    Raises ExportError if ComfyUI cannot read a unit's format, or if `out` exists.
    """
    if out.exists():
        raise ExportError(f"{out} exists; choose another name or delete it.")
    parts, layers = _decoded_parts(artifact) if decoded else _planned(artifact)
    header, offsets = lay_out(parts, _metadata(artifact, layers))
    with atomic_file(out) as file:
        file.write(header)
        for unit in artifact.units():
            for name, tensor in _values(artifact, unit, decoded).items():
                file.seek(offsets[name])
                data = _bytes(tensor)
                for start in range(0, data.nbytes, CHUNK):
                    file.write(data[start : start + CHUNK].data)
    return out.stat().st_size


def _values(artifact: Artifact, unit: Unit, decoded: bool) -> Mapping[str, torch.Tensor]:
    """The tensors of a unit in the form of the file."""
    if not decoded:
        return artifact.codec(unit.name).comfyui_values(unit, artifact.parts(unit.name))
    return {name: tensor.bfloat16() for name, tensor in artifact.decode(unit.name).items()}


def _decoded_parts(artifact: Artifact) -> tuple[dict[str, PartSpec], dict[str, dict[str, str]]]:
    """The same as `_planned`, for a file with every weight decoded."""
    return {spec.name: PartSpec("BF16", spec.shape) for unit in artifact.units() for spec in unit.specs}, {}


def _planned(artifact: Artifact) -> tuple[dict[str, PartSpec], dict[str, dict[str, str]]]:
    """The parts of the file, found with tensors without values, and ComfyUI's format of each layer that has one."""
    import torch

    parts: dict[str, PartSpec] = {}
    layers: dict[str, dict[str, str]] = {}
    for unit in artifact.units():
        codec = artifact.codec(unit.name)
        stored = {
            name: torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype](), device="meta")
            for name, part in codec.parts(unit).items()
        }
        for name, tensor in codec.comfyui_values(unit, stored).items():
            parts[name] = PartSpec(dtype_code(tensor.dtype), tuple(tensor.shape))
        if codec.comfyui_format:
            layers |= {spec.name.removesuffix(".weight"): {"format": codec.comfyui_format} for spec in unit.specs}
    return parts, layers


def _metadata(artifact: Artifact, layers: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    if layers:
        return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    configs = {name: json.loads(artifact.file(name).read_text("utf-8")) for name in CONFIG_FILES}
    entry = {"format": "comfyui_bagel", "format_version": 1, "variant": "BAGEL-7B-MoT", "dtype": "bf16"}
    return {"comfyui_bagel": json.dumps(entry | {"quantization": "none", "model_configs": configs})}


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()
