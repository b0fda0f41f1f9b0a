"""Parity of an export: its graphs, run by ONNX Runtime, against the traces of the checkpoint they came from.

The same cases, distances, limits and reports as for an artifact; only the probes of single linear modules are left out,
since a graph has no modules. Engines cannot be judged without a card: their graphs can, by exporting for onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from bagel_compress.errors import ExportError
from bagel_compress.export.as_torch import TorchFace
from bagel_compress.export.manifest import ExportFolder
from bagel_compress.export.ort_sampler import GraphSampler
from bagel_compress.export.ort_session import Sessions
from bagel_compress.limits import resolve
from bagel_compress.reports import ParityReport
from bagel_compress.trace import TraceFile
from bagel_compress.validate.judge import write
from bagel_compress.validate.parity import Subject, compare

if TYPE_CHECKING:
    from bagel_compress.artifact import Artifact


def validate_export(
    folder: ExportFolder,
    traces: Sequence[str | Path],
    threads: int = 0,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Judges an export by the limits of its recipe and writes the reports beside it; on the CPU where there is no card.

    Raises ExportError for engines, TraceError on traces of another checkpoint.
    """
    manifest = folder.manifest
    if manifest.settings.runtime != "onnxruntime":
        raise ExportError(f"{folder.path} holds engines, which run on a card only; its graphs were checked when built.")
    files = [TraceFile.open(trace) for trace in traces]
    for file in files:
        file.expect_source(manifest.source["checkpoint"], str(folder.path))
    provider = manifest.settings.provider if torch.cuda.is_available() else "cpu"
    sampler = TorchFace(GraphSampler(folder, Sessions(folder, provider, threads)))
    level = manifest.limits.level
    limits = resolve(level, manifest.limits.overrides)
    name = f"{manifest.source['name']} ({manifest.settings.runtime} on {provider}, {manifest.settings.precision})"
    found = compare(Subject(sampler, name, folder.digest, level, limits), [_Unprobed(f) for f in files], None, progress)  # type: ignore[misc]
    write(cast("Artifact", folder), found)
    return found.report


class _Unprobed:
    """A trace file without probes."""

    def __init__(self, file: TraceFile) -> None:
        self._file = file

    def probes(self) -> Mapping[str, Any]:
        return {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
