"""Loads the reports of a build for its release, and lists everything that keeps the build from being released.

An export has to pass the same checks as an artifact. Its engines may have been built without a GPU to run them on. If
so, parity was measured on another form of it: `was_run` is False unless runtime and precision of the parity report are
those of the export, `not_run` says for the model card what was never run, and a release needs `unrun`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bagel_compress.budgets.overruns import overruns
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.limits import resolve
from bagel_compress.errors import ArtifactError, RecipeError
from bagel_compress.exporting.manifest import ExportFolder, ExportManifest
from bagel_compress.io.digests import blake3_file
from bagel_compress.io.packaged import target_files
from bagel_compress.io.safe_paths import leads_away
from bagel_compress.parity.report_data import PARITY, REPORTS, BudgetReport, ParityReport, load_budgets
from bagel_compress.parity.verdict import recheck
from bagel_compress.publishing.publishable import Publishable, source_of
from bagel_compress.report.files import picture_name
from bagel_compress.run.target import Target
from bagel_compress.scores.evaluation_report import EvaluationReport, load_evaluations


@dataclass(frozen=True)
class ReleaseReports:
    """The reports that contain the build's digest."""

    parity: ParityReport | None = None
    budgets: tuple[BudgetReport, ...] = ()
    evaluations: tuple[EvaluationReport, ...] = ()  # published benchmarks, if any were run
    files: tuple[str, ...] = ()  # paths of the reports and pictures under the build's folder
    pictures: Mapping[str, str] = field(default_factory=dict)  # case -> path of its picture
    was_run: bool = True  # the parity report is of the form that is published (always, for an artifact)
    not_run: tuple[str, ...] = ()  # what was never run, one sentence each, for the card

    def prompt(self, case: str) -> str:
        """The prompt of a case; empty if the report has no such case."""
        cases = self.parity.cases if self.parity else ()
        return next((c.prompt for c in cases if c.name == case), "")


def load_reports(publishable: Publishable) -> tuple[ReleaseReports, list[str]]:
    """The reports of a build, and one phrase for each that is missing, of another build, or did not pass.

    Reports of another build are left out, and so are their pictures.
    """
    parity, faults = _parity(publishable)
    budgets, more = _budgets(publishable) if isinstance(publishable, Artifact) else ((), publishable.over_disk)
    evaluations, strange = _evaluations(publishable)
    more = [*more, *strange]
    was_run, not_run = (True, ()) if isinstance(publishable, Artifact) else _ran(publishable, parity)
    if parity is None or (more and any("another build" in fault for fault in more)):
        own = _own_files(parity, budgets, evaluations)
        return ReleaseReports(parity, budgets, evaluations, own, was_run=was_run, not_run=not_run), faults + more
    pictures, strays = _pictures(publishable.path, parity)
    files = (*_own_files(parity, budgets, evaluations), *pictures.values())
    folder = publishable.path
    linked = [f"{name} is a link; put the file itself there" for name in files if leads_away(folder / name, folder)]
    found = ReleaseReports(parity, budgets, evaluations, files, pictures, was_run, not_run)
    return found, [*faults, *more, *strays, *linked]


def _pictures(folder: Path, parity: ParityReport) -> tuple[dict[str, str], list[str]]:
    """Case -> path of its picture, and a phrase for each picture that is missing or was changed after validation."""
    found: dict[str, str] = {}
    faults = []
    for case in parity.cases:
        name = picture_name(case.name)
        if not case.has_image:
            continue
        if (folder / name).is_file() and blake3_file(folder / name) == parity.pictures.get(case.name):
            found[case.name] = name
        else:
            faults.append(f"{name} is not the picture that was compared; run `bagel-compress validate` again")
    return found, faults


def runtime_of(parity: ParityReport) -> str:
    """The runtime, provider and precision that the parity of an export was measured with, as text."""
    known = parity.environment
    names = ("runtime", "version", "provider", "precision")
    return "{} {} on {} in {}".format(*(known.get(name, "unknown") for name in names))


def _ran(export: ExportFolder, parity: ParityReport | None) -> tuple[bool, tuple[str, ...]]:
    """(was_run, not_run) of an export. A parity report that does not name its runtime does not count."""
    settings = export.manifest.settings
    known = {} if parity is None else parity.environment
    was_run = (known.get("runtime"), known.get("precision")) == (settings.runtime, settings.precision)
    instead = "Nothing was run." if parity is None else f"Their graphs and weights were run by {runtime_of(parity)}."
    if settings.runtime != "onnxruntime" and not was_run:
        return False, (f"The engines were built with {settings.runtime} and never run. {instead}",)
    if not was_run:
        return False, (f"The graphs in {settings.precision} were written and never run as they are. {instead}",)
    if settings.provider == "cuda" and known.get("provider") != "cuda":
        return True, ("The graphs were run on a CPU and never on a GPU.",)
    return True, ()


def _parity(publishable: Publishable) -> tuple[ParityReport | None, list[str]]:
    if not (publishable.path / REPORTS / PARITY).is_file():
        return None, ["it has no parity report; run `bagel-compress validate`"]
    try:
        report = ParityReport.load(publishable.path, publishable.digest)
    except ArtifactError as error:
        return None, [str(error).rstrip(".")]
    why = _verdict(publishable, report)
    return report, [f"parity did not pass: {' '.join(why).rstrip('.')}"] if why else []


def _verdict(publishable: Publishable, report: ParityReport) -> list[str]:
    """The reasons why a parity report does not pass, computed again under the limits of the manifest's recipe."""
    faults = []
    if isinstance(publishable, ExportFolder):
        limits, level = publishable.manifest.limits, publishable.manifest.level
    else:
        recipe = publishable.manifest.recipe
        limits, level = recipe.limits, recipe.limits.level
        if recipe.digest != publishable.manifest.recipe_digest:
            faults.append("The recipe in its manifest does not match the manifest's recipe_digest; build it again.")
    if report.source_digest != source_of(publishable).digest:
        faults.append("It was compared with a checkpoint that it was not built from.")
    try:
        resolved = resolve(level, limits.overrides)
    except RecipeError as error:
        return [*faults, str(error)]
    manifest = publishable.manifest
    presets = manifest.presets if isinstance(manifest, ExportManifest) else manifest.recipe.fast
    return faults + recheck(report, resolved, level, isinstance(publishable, Artifact), presets)


def _budgets(artifact: Artifact) -> tuple[tuple[BudgetReport, ...], list[str]]:
    """The budget reports, and the faults: a broken limit, no report for a target of the recipe, or none at all."""
    try:
        reports = load_budgets(artifact.path, artifact.digest)
    except ArtifactError as error:
        return (), [str(error).rstrip(".")]
    faults = [
        f"budget of {r.target}: {' '.join(broken).rstrip('.')}" for r in reports if (broken := _broken(artifact, r))
    ]
    listed = [Path(target).name.removesuffix(".yaml") for target in artifact.manifest.recipe.targets]
    missing = [target for target in listed if target not in {r.target for r in reports}]
    faults += [f"it has no budget report for {t}; run `bagel-compress budget --target {t}`" for t in missing]
    if not reports and not listed:
        faults.append("it has no budget report; run `bagel-compress budget`")
    return tuple(reports), faults


def _broken(artifact: Artifact, report: BudgetReport) -> list[str]:
    """One sentence per limit that the report's numbers break. Limits of a packaged target are taken from the target."""
    disk = float(sum(entry.bytes for entry in artifact.manifest.files.values()))
    report = report.model_copy(update={"disk": disk})
    if report.target not in target_files():
        return list(overruns(report, None))
    target = Target.load(target_files()[report.target])
    tasks = {phase.name.partition(":")[0] for phase in report.phases}
    unmeasured = [f"It says nothing of {task}." for task in target.tasks if task not in tasks]
    limits = {"limit": target.limit, "disk_limit": target.disk_limit}
    return [*unmeasured, *overruns(report.model_copy(update=limits), target)]


def _evaluations(publishable: Publishable) -> tuple[tuple[EvaluationReport, ...], list[str]]:
    try:
        return tuple(load_evaluations(publishable.path, publishable.digest)), []
    except ArtifactError as error:
        return (), [str(error).rstrip(".")]


def _own_files(
    parity: ParityReport | None, budgets: tuple[BudgetReport, ...], evaluations: tuple[EvaluationReport, ...]
) -> tuple[str, ...]:
    """Paths of the reports that belong to this build."""
    own = [f"{REPORTS}/budget-{b.target}.json" for b in budgets]
    own += [f"{REPORTS}/evaluation-{e.benchmark}.json" for e in evaluations]
    return tuple(([f"{REPORTS}/{PARITY}"] if parity else []) + own)
