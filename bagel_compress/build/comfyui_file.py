"""comfyui_file: an fp8 artifact as the single "fp8 scaled" file that ComfyUI's loaders read.

The same codes under the same names; each scale becomes an fp32 scalar, and the file's metadata lists the layers
(QUANTIZATION.md of Comfy-Org/ComfyUI). It needs one scale per tensor: recipe `fp8-comfyui`. Written by streaming from
the mapped shards. The VAE is not part of the file; ComfyUI loads it apart.
"""

from __future__ import annotations

import os
from pathlib import Path

from bagel_compress.build.artifact import Artifact
from bagel_compress.codecs.fp8 import Fp8, comfy_metadata, comfy_scale, scale_name
from bagel_compress.codecs.raw import Raw
from bagel_compress.errors import ExportError
from bagel_compress.io.atomic import PARTIAL, sync_folder
from bagel_compress.io.safetensors_file import DTYPE_ORDER, lay_out
from bagel_compress.io.tensor_spec import PartSpec

CHUNK = 8 << 20  # bytes per write


def comfyui_file(artifact: Artifact, out: Path) -> int:
    """Writes the file and returns its size in bytes.

    Raises ExportError if a unit is neither raw nor fp8, if a scale is per channel, or if `out` exists.
    """
    if out.exists():
        raise ExportError(f"{out} exists; choose another name or delete it.")
    parts: dict[str, PartSpec] = {}
    scales: dict[str, str] = {}  # part name of a scale -> its unit
    for name, entry in artifact.manifest.units.items():
        if not isinstance(entry.codec, (Raw, Fp8)):
            raise ExportError(
                f"{name} is {entry.codec.format}; a ComfyUI file holds fp8 and bf16: use recipe fp8-comfyui."
            )
        parts |= {part: stored.spec for part, stored in entry.parts.items()}
        if isinstance(entry.codec, Fp8):
            scale = scale_name(artifact.unit(name).specs[0])
            parts[scale] = PartSpec("F32", ())
            scales[scale] = name
            _scale_bytes(artifact, name, scale)  # refuses before anything is written
    header, _ = lay_out(parts, comfy_metadata(scales.values()))
    units = {part: name for name, entry in artifact.manifest.units.items() for part in entry.parts}
    partial = out.with_name(out.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(header)
        for part in sorted(parts, key=lambda n: (DTYPE_ORDER[parts[n].dtype], n)):
            if part in scales:
                file.write(_scale_bytes(artifact, scales[part], part))
                continue
            data = artifact.part_bytes(units[part], part)
            for start in range(0, data.nbytes, CHUNK):
                file.write(data[start : start + CHUNK].data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, out)
    sync_folder(out.parent)
    return out.stat().st_size


def _scale_bytes(artifact: Artifact, unit: str, scale: str) -> bytes:
    codec, spec = artifact.codec(unit), artifact.unit(unit).specs[0]
    assert isinstance(codec, Fp8)
    return comfy_scale(codec, spec, artifact.parts(unit)[scale]).numpy().tobytes()
