"""Parity of an export: runs its graphs on this machine and compares them with traces of their checkpoint.

Cases, distances, limits and reports are those of an artifact; only the probes of single linear modules are left out,
since a graph has no modules. TensorRT engines are run if there is a GPU. Otherwise the graphs are run by ONNX Runtime;
bf16 graphs, which it cannot run on a CPU, are converted to fp32 first. The report's environment says which was run.
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
from bagel_compress.validation.artifact import write_reports


def validate_export(
    folder: ExportFolder,
    traces: Sequence[str | Path],
    threads: int = 0,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compares an export with traces of its checkpoint under its recipe's limits; writes the reports into its folder.

    `threads` is the size of the CPU thread pool, 0 for one per core. Raises TraceError on traces of another checkpoint,
    ExportError if the folder lacks some of the model's blocks.
    """
    manifest = folder.manifest
    files = [TraceFile.open(trace) for trace in traces]
    for file in files:
        file.expect_source(manifest.source.checkpoint.digest, str(folder.path))
    level = manifest.level
    limits = resolve(level, manifest.limits.overrides)
    with _open_sampler(folder, threads) as (sampler, runtime):
        name = f"{manifest.source.name} ({runtime['runtime']} on {runtime['provider']}, {runtime['precision']})"
        candidate = Candidate(sampler, name, folder.digest, level, limits, presets=manifest.presets, has_modules=False)
        found = compare(candidate, files, None, progress)
    reference = {k: v for k, v in found.report.environment.items() if k.startswith("reference")}
    report = found.report.model_copy(update={"environment": runtime | reference})
    return write_reports(folder, Comparison(report, found.pictures))


@contextmanager
def _open_sampler(folder: ExportFolder, threads: int) -> Iterator[tuple[TorchAdapter, dict[str, str]]]:
    """The export as a torch sampler, and the runtime, device and precision that it runs in on this machine."""
    settings, gpu = folder.manifest.settings, torch.cuda.is_available()
    if settings.runtime != "onnxruntime" and gpu:
        from bagel_compress.exporting.trt_runner import Engines

        runtime = _environment(settings.runtime, "cuda", settings.precision)
        yield TorchAdapter(GraphSampler(folder, Engines(folder))), runtime
        return
    provider = settings.provider if gpu else "cpu"
    if settings.precision != "bf16" or provider == "cuda":
        sampler = GraphSampler(folder, Sessions(folder, provider, threads))
        yield TorchAdapter(sampler), _environment("onnxruntime", provider, settings.precision)
        return
    with TemporaryDirectory(dir=folder.path.resolve().parent) as temporary:
        sampler = GraphSampler(folder, Sessions(fp32_copy(folder, Path(temporary)), "cpu", threads))
        yield TorchAdapter(sampler), _environment("onnxruntime", "cpu", "fp32")


def _environment(runtime: str, provider: str, precision: str) -> dict[str, str]:
    known = versions()
    version = known.get(runtime) or known.get(runtime.replace("-", "_")) or "unknown"
    device = torch.cuda.get_device_name() if provider == "cuda" else "cpu"
    return {"runtime": runtime, "version": version, "provider": provider, "precision": precision, "device": device}
