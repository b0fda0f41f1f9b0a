"""comfyui_file: an artifact as the single file that ComfyUI's loaders read ("fp8 scaled").

The tensors are those of the codecs (`Codec.comfyui_values`), and the file's metadata lists the layers that are not full
precision (QUANTIZATION.md of Comfy-Org/ComfyUI, format_version 1.0). fp8 needs one scale per tensor: recipe
`fp8-comfyui`. The file is written from the mapped shards, a piece at a time. The VAE is not part of it; ComfyUI loads
it apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from bagel_compress.build.artifact import Artifact
from bagel_compress.codecs.base import dtype_code
from bagel_compress.errors import ExportError
from bagel_compress.io.atomic import atomic_file
from bagel_compress.io.safetensors_file import DTYPE_ORDER, lay_out
from bagel_compress.io.tensor_spec import PartSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

CHUNK = 8 << 20  # bytes per write


def comfyui_file(artifact: Artifact, out: Path) -> int:
    """Writes the file and returns its size in bytes.

    Raises ExportError if ComfyUI cannot read a unit's format, or if `out` exists.
    """
    if out.exists():
        raise ExportError(f"{out} exists; choose another name or delete it.")
    values: dict[str, torch.Tensor] = {}  # views of the mapped shards
    layers: dict[str, dict[str, str]] = {}
    for unit in artifact.units():
        codec = artifact.codec(unit.name)
        values |= codec.comfyui_values(unit, artifact.parts(unit.name))
        if codec.comfyui_format:
            layers |= {spec.name.removesuffix(".weight"): {"format": codec.comfyui_format} for spec in unit.specs}
    parts = {name: PartSpec(dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in values.items()}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    header, _ = lay_out(parts, metadata)
    with atomic_file(out) as file:
        file.write(header)
        for name in sorted(parts, key=lambda n: (DTYPE_ORDER[parts[n].dtype], n)):
            data = _bytes(values[name])
            for start in range(0, data.nbytes, CHUNK):
                file.write(data[start : start + CHUNK].data)
    return out.stat().st_size


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()
