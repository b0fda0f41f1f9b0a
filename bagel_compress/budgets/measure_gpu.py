"""Measures a loaded build: peak memory and times on a CUDA GPU, or times alone on a CPU.

The peak of a phase is the maximum that torch's allocator had allocated during it, plus the memory that the driver
reports as used outside that allocator: the CUDA context, libraries, and any other program on the GPU. Use an idle GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bagel.sampler import Sampler
from bagel_compress.budgets.fake_model import FakeText
from bagel_compress.budgets.latency import device_name, timings
from bagel_compress.budgets.predict import run_passes, with_verdict
from bagel_compress.build.artifact import Artifact
from bagel_compress.errors import TargetError
from bagel_compress.parity.report_data import BudgetReport
from bagel_compress.run.device_map import device_named
from bagel_compress.run.load import load, load_checkpoint
from bagel_compress.run.offload import place
from bagel_compress.run.target import Target
from bagel_compress.source.checkpoint import Checkpoint


def timed(
    artifact: Artifact, predicted: BudgetReport, target: Target, source: Checkpoint | None = None
) -> BudgetReport:
    """The predicted report with times measured on this machine's CPU, also those of `source`, if given.

    Peaks stay predicted.
    """
    found = timings(load(artifact, "cpu"), target, None if source is None else load_checkpoint(source, "cpu"))
    update = {"timings": found, "timed_on": device_name(torch.device("cpu"))}
    return with_verdict(predicted.model_copy(update=update), target)


def measured(
    artifact: Artifact, predicted: BudgetReport, target: Target, device: str, source: Checkpoint | None = None
) -> BudgetReport:
    """The predicted report with measured peaks and times, also the times of `source`, if given.

    Raises TargetError if `device` is not the GPU of the target, or if the source does not fit beside the build.
    """
    name = require_gpu(device, target)
    movable = all(unit.codec.movable for unit in artifact.manifest.units.values())
    loaded = load(artifact, "cpu" if movable else device)
    place(loaded, target, device)
    text, loaded.text = loaded.text, FakeText()
    peaks = [peak for task in target.tasks for peak in _peaks(loaded, task, target, torch.device(device))]
    loaded.text = text
    phases = tuple(
        phase.model_copy(update={"measured": float(peak)}) for phase, peak in zip(predicted.phases, peaks, strict=True)
    )
    reference = None if source is None else _beside(source, device)
    update = {"phases": phases, "timings": timings(loaded, target, reference), "measured_on": name, "timed_on": name}
    return with_verdict(predicted.model_copy(update=update), target)


def _beside(source: Checkpoint, device: str) -> Sampler:
    try:
        return load_checkpoint(source, device)
    except torch.OutOfMemoryError:
        raise TargetError(
            f"{source.name} does not fit on {device} beside the build, so their times cannot be compared there; leave"
            " --source away."
        ) from None


def require_gpu(device: str, target: Target) -> str:
    """The name of the GPU `device`. Raises TargetError if it does not exist or is not the target's."""
    if device.partition(":")[0] != "cuda" or not torch.cuda.is_available():
        raise TargetError(
            f"{device} is no CUDA device here, so {target.name} ({target.device.name}) cannot be measured; leave"
            " --device away for a prediction."
        )
    name = torch.cuda.get_device_name(device_named(device))
    if name != target.device.name:
        raise TargetError(f"{device} is {name}, the target {target.name} is {target.device.name}; measure on that GPU.")
    return name


@dataclass(slots=True)
class _Readings:
    """Reads the peak of each phase, in the order in which they first begin. A phase ends where the next one begins."""

    device: torch.device
    peaks: dict[str, int] = field(default_factory=dict)
    phase: str = ""

    def enter(self, phase: str) -> None:
        self.close()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.phase = phase

    def close(self) -> None:
        if self.phase:
            torch.cuda.synchronize(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            outside = total - free - torch.cuda.memory_reserved(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) + outside
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), peak)


def _peaks(sampler: Sampler, task: str, target: Target, device: torch.device) -> list[int]:
    readings = _Readings(device)
    with torch.no_grad():
        run_passes(sampler, task, target, readings.enter)  # type: ignore[arg-type]
    readings.close()
    return list(readings.peaks.values())
