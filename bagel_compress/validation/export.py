"""Parity of an export: its graphs, run here, against the traces of the checkpoint they came from.

The same cases, distances, limits and reports as for an artifact; only the probes of single linear modules are left out,
since a graph has no modules. The report's environment says what was run: the graphs as they are where the runtime can,
the engines where there is a GPU, else the folder's own bf16 graphs and weights as fp32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bagel_compress.build.limits import resolve
from bagel_compress.exporting.build import versions
from bagel_compress.exporting.fp32_copy import fp32_copy
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.exporting.ort_sampler import GraphSampler
from bagel_compress.exporting.ort_session import Sessions
from bagel_compress.exporting.torch_adapter import TorchAdapter
from bagel_compress.parity.compare import Candidate, Comparison, compare
from bagel_compress.parity.report_data import ParityReport
from bagel_compress.parity.trace import TraceFile
from bagel_compress.validation.artifact import write


def validate_export(
    folder: ExportFolder,
    traces: Sequence[str | Path],
    threads: int = 0,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compares an export with traces of its checkpoint under its recipe's limits, and writes the reports beside it.

    Raises TraceError on traces of another checkpoint, ExportError if the folder holds some blocks only.
    """
    manifest = folder.manifest
    files = [TraceFile.open(trace) for trace in traces]
    for file in files:
        file.expect_source(manifest.source.checkpoint.digest, str(folder.path))
    level = manifest.level
    limits = resolve(level, manifest.limits.overrides)
    with _running(folder, threads) as (sampler, ran):
        name = f"{manifest.source.name} ({ran['runtime']} on {ran['provider']}, {ran['precision']})"
        subject = Candidate(sampler, name, folder.digest, level, limits, has_modules=False)
        found = compare(subject, files, None, progress)
    reference = {k: v for k, v in found.report.environment.items() if k.startswith("reference")}
    report = found.report.model_copy(update={"environment": ran | reference})
    return write(folder, Comparison(report, found.pictures))


@contextmanager
def _running(folder: ExportFolder, threads: int) -> Iterator[tuple[TorchAdapter, dict[str, str]]]:
    """The export as a torch sampler, and the runtime, device and precision that it really runs in."""
    settings, gpu = folder.manifest.settings, torch.cuda.is_available()
    if settings.runtime != "onnxruntime" and gpu:
        from bagel_compress.exporting.trt_runner import Engines

        yield TorchAdapter(GraphSampler(folder, Engines(folder))), _ran(settings.runtime, "cuda", settings.precision)
        return
    provider = settings.provider if gpu else "cpu"
    if settings.precision != "bf16" or provider == "cuda":
        sampler = GraphSampler(folder, Sessions(folder, provider, threads))
        yield TorchAdapter(sampler), _ran("onnxruntime", provider, settings.precision)
        return
    with TemporaryDirectory(dir=folder.path.resolve().parent) as place:
        sampler = GraphSampler(folder, Sessions(fp32_copy(folder, Path(place)), "cpu", threads))
        yield TorchAdapter(sampler), _ran("onnxruntime", "cpu", "fp32")


def _ran(runtime: str, provider: str, precision: str) -> dict[str, str]:
    known = versions()
    version = known.get(runtime) or known.get(runtime.replace("-", "_")) or "unknown"
    device = torch.cuda.get_device_name() if provider == "cuda" else "cpu"
    return {"runtime": runtime, "version": version, "provider": provider, "precision": precision, "device": device}
