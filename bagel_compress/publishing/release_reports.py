"""The reports of a build as a release needs them, and everything that keeps it from being one.

An export is judged like an artifact. What it cannot be held to where it is published, because there is no card to run
its engines on, is never passed over in silence: `not_run` says it in words, for the card; and unless the very form that
is published was run (runtime and precision of the parity report are those of the export), `tried` is False, and a
release needs the publisher's word for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bagel_compress.budgets.overruns import overruns
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.limits import resolve
from bagel_compress.errors import ArtifactError, RecipeError
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.io.digests import blake3_file
from bagel_compress.io.packaged import target_files
from bagel_compress.io.safe_paths import leads_away
from bagel_compress.parity.report_data import PARITY, REPORTS, BudgetReport, ParityReport, load_budgets
from bagel_compress.parity.verdict import recheck
from bagel_compress.publishing.publishable import Publishable, source_of
from bagel_compress.report.files import picture_name
from bagel_compress.run.target import Target


@dataclass(frozen=True)
class ReleaseReports:
    """Reports that carry the build's digest. `files` are their paths under its folder, `pictures` case -> path."""

    parity: ParityReport | None = None
    budgets: tuple[BudgetReport, ...] = ()
    files: tuple[str, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    tried: bool = True  # what is published was run, not only what stands for it
    not_run: tuple[str, ...] = ()  # one sentence each, for the card

    def prompt(self, case: str) -> str:
        """The prompt of a case, empty if the report does not know it."""
        cases = self.parity.cases if self.parity else ()
        return next((c.prompt for c in cases if c.name == case), "")


def load_reports(publishable: Publishable) -> tuple[ReleaseReports, list[str]]:
    """The reports, and one phrase for each that is missing, stale or not passed.

    A report of another build is named and left out, and with it everything that could be drawn from it.
    """
    parity, faults = _parity(publishable)
    budgets, more = _budgets(publishable) if isinstance(publishable, Artifact) else ((), publishable.over_disk)
    tried, not_run = (True, ()) if isinstance(publishable, Artifact) else _ran(publishable, parity)
    if parity is None or (more and any("another build" in fault for fault in more)):
        own = _own_files(parity, budgets)
        return ReleaseReports(parity, budgets, own, tried=tried, not_run=not_run), faults + more
    pictures, strays = _pictures(publishable.path, parity)
    files = (*_own_files(parity, budgets), *pictures.values())
    folder = publishable.path
    linked = [f"{name} is a link; put the file itself there" for name in files if leads_away(folder / name, folder)]
    return ReleaseReports(parity, budgets, files, pictures, tried, not_run), [*faults, *more, *strays, *linked]


def _pictures(folder: Path, parity: ParityReport) -> tuple[dict[str, str], list[str]]:
    """Case -> path of its picture, and a phrase for each that is not the one that was compared."""
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


def ran(parity: ParityReport) -> str:
    """What the parity of an export was measured on, in words."""
    known = parity.environment
    names = ("runtime", "version", "provider", "precision")
    return "{} {} on {} in {}".format(*(known.get(name, "unknown") for name in names))


def _ran(export: ExportFolder, parity: ParityReport | None) -> tuple[bool, tuple[str, ...]]:
    """Whether the form itself was run, and what was not. A report that does not say what was run counts for nothing."""
    settings = export.manifest.settings
    known = {} if parity is None else parity.environment
    tried = (known.get("runtime"), known.get("precision")) == (settings.runtime, settings.precision)
    stood_in = "Nothing was run." if parity is None else f"Their graphs and weights were run by {ran(parity)}."
    if settings.runtime != "onnxruntime" and not tried:
        return False, (f"The engines were built with {settings.runtime} and never run. {stood_in}",)
    if not tried:
        return False, (f"The graphs in {settings.precision} were written and never run as they are. {stood_in}",)
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
    """What keeps the report from passing, computed again under the limits of the manifest's recipe."""
    faults = []
    if isinstance(publishable, ExportFolder):
        limits, level = publishable.manifest.limits, publishable.manifest.level
    else:
        recipe = publishable.manifest.recipe
        limits, level = recipe.limits, recipe.limits.level
        if recipe.digest != publishable.manifest.recipe_digest:
            faults.append("Its manifest's recipe is not the one of its recipe_digest; build it again.")
    if report.source_digest != source_of(publishable).digest:
        faults.append("It was compared with another checkpoint than it was built from.")
    try:
        resolved = resolve(level, limits.overrides)
    except RecipeError as error:
        return [*faults, str(error)]
    presets = publishable.manifest.recipe.fast if isinstance(publishable, Artifact) else ()
    return faults + recheck(report, resolved, level, isinstance(publishable, Artifact), presets)


def _budgets(artifact: Artifact) -> tuple[tuple[BudgetReport, ...], list[str]]:
    """Every target that the recipe promises, and at least one."""
    try:
        reports = load_budgets(artifact.path, artifact.digest)
    except ArtifactError as error:
        return (), [str(error).rstrip(".")]
    faults = [
        f"budget of {r.target}: {' '.join(broken).rstrip('.')}" for r in reports if (broken := _over(artifact, r))
    ]
    promised = [Path(target).name.removesuffix(".yaml") for target in artifact.manifest.recipe.targets]
    missing = [target for target in promised if target not in {r.target for r in reports}]
    faults += [f"it has no budget report for {t}; run `bagel-compress budget --target {t}`" for t in missing]
    if not reports and not promised:
        faults.append("it has no budget report; run `bagel-compress budget`")
    return tuple(reports), faults


def _over(artifact: Artifact, report: BudgetReport) -> list[str]:
    """What the report's numbers break, computed again. A target that comes with the package is asked itself."""
    disk = float(sum(entry.bytes for entry in artifact.manifest.files.values()))
    report = report.model_copy(update={"disk": disk})
    if report.target not in target_files():
        return list(overruns(report, None))
    target = Target.load(target_files()[report.target])
    tasks = {phase.name.partition(":")[0] for phase in report.phases}
    unmeasured = [f"It says nothing of {task}." for task in target.tasks if task not in tasks]
    limits = {"limit": target.limit, "disk_limit": target.disk_limit}
    return [*unmeasured, *overruns(report.model_copy(update=limits), target)]


def _own_files(parity: ParityReport | None, budgets: tuple[BudgetReport, ...]) -> tuple[str, ...]:
    """Only the reports that belong to this build."""
    own = [f"{REPORTS}/budget-{b.target}.json" for b in budgets]
    return tuple(([f"{REPORTS}/{PARITY}"] if parity else []) + own)
