"""Checks a build's parity with its source and its budget on targets; the commands `check` and `budget` use it.

Budgets are predicted without a GPU. A value counts as measured only if it was measured on the target's own GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bagel_compress.budgets.fake_model import BuildOutline
from bagel_compress.budgets.measure_gpu import measured, timed
from bagel_compress.budgets.planned_build import planned_build
from bagel_compress.budgets.predict import predict
from bagel_compress.budgets.recommend import recommendation
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import TargetError
from bagel_compress.parity.compare import Progress
from bagel_compress.parity.report_data import BudgetReport, ParityReport
from bagel_compress.report.files import write_pages_again
from bagel_compress.run.target import Target
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.validation.artifact import validate_artifact


def check(
    artifact: str | Path,
    traces: Sequence[str | Path],
    targets: Sequence[str | Path],
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[ParityReport, list[BudgetReport]]:
    """Compares an artifact with traces and with targets, and writes all reports into its folder."""
    budgets = budgets_of(artifact, targets, device=device if device != "cpu" else None)
    return validate_artifact(artifact, traces, device=device, progress=progress), budgets


def budgets_of(
    build: str | Path | Recipe,
    targets: Sequence[str | Path | Target],
    source: str | None = None,
    device: str | None = None,
) -> list[BudgetReport]:
    """The budget on each target of an artifact, or of a recipe for the checkpoint `source` (default: the released one).

    Reports of an artifact are written into its folder. With `device`, peaks and times are measured on that CUDA device,
    or only times on "cpu"; with `source` too, so are the times of the full-precision model. Raises TargetError if the
    device does not exist or is not the target's GPU, or if the artifact was not made from `source`.
    """
    loaded = [t if isinstance(t, Target) else Target.load(t) for t in targets]
    folder = None if isinstance(build, Recipe) else Path(build)
    if folder is None or not (folder / MANIFEST).exists():
        if device is not None:
            name = build.name if isinstance(build, Recipe) else build
            raise TargetError(f"{name} is a recipe; only an artifact can be measured on {device}. Leave out --device.")
        planned = planned_build(build if isinstance(build, Recipe) else str(build), source)
        return [_predicted(planned, target) for target in loaded]
    artifact = Artifact.open(folder)
    known = BuildOutline.of_artifact(artifact)
    reports = [_predicted(known, target) for target in loaded]
    if source is not None and device is None:
        raise TargetError(f"{build} is an artifact: --source is used only to compare times; give --device to measure.")
    if device is not None:
        reference = None if source is None else _source_of(artifact, source)
        reports = [_measured(artifact, r, t, device, reference) for r, t in zip(reports, loaded, strict=True)]
    for report in reports:
        report.save(folder)
    write_pages_again(folder, artifact.digest)
    return reports


def _predicted(build: BuildOutline, target: Target) -> BudgetReport:
    """The prediction; if the build does not fit, its advice ends with a packaged target or recipe that does."""
    report = predict(build, target)
    hint = recommendation(build, target) if report.limit is not None and report.peak > report.limit else ""
    return report.model_copy(update={"advice": (*report.advice, hint)}) if hint else report


def _measured(
    artifact: Artifact, report: BudgetReport, target: Target, device: str, source: Checkpoint | None
) -> BudgetReport:
    if device == "cpu":
        return timed(artifact, report, target, source)
    return measured(artifact, report, target, device, source)


def _source_of(artifact: Artifact, source: str) -> Checkpoint:
    """The opened checkpoint `source`. Raises TargetError if the artifact was not made from it."""
    checkpoint = Checkpoint.open(source)
    if checkpoint.digest != artifact.manifest.source.digest:
        raise TargetError(
            f"{artifact.path} was made from {artifact.manifest.source.name}"
            f" ({artifact.manifest.source.digest[:12]}), not from {source} ({checkpoint.digest[:12]}); give its source."
        )
    return checkpoint
