"""The reports of a build as a release needs them, and everything that keeps it from being one.

An export is judged like an artifact. What it cannot be held to where it is published, because there is no card to run
its engines on, is never passed over in silence: `not_run` says it in words, for the card; and unless the very form that
is published was run (runtime and precision of the parity report are those of the export), `tried` is False, and a
release needs the publisher's word for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bagel_compress.build.artifact import Artifact
from bagel_compress.errors import ArtifactError
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.parity.report_data import PARITY, REPORTS, BudgetReport, ParityReport, load_budgets
from bagel_compress.publishing.publishable import Publishable

PAGE = "report.html"


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
    folder = publishable.path
    files = sorted(p.relative_to(folder).as_posix() for p in (folder / REPORTS).rglob("*") if p.is_file())
    files += [PAGE] if (folder / PAGE).is_file() else []
    pictures = {c.name: f"{REPORTS}/{c.name}.png" for c in parity.cases if f"{REPORTS}/{c.name}.png" in files}
    return ReleaseReports(parity, budgets, tuple(files), pictures, tried, not_run), faults + more


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
    why = " ".join([*report.faults, *report.broken]).rstrip(".")
    return report, [] if report.passed else [f"parity did not pass: {why}"]


def _budgets(artifact: Artifact) -> tuple[tuple[BudgetReport, ...], list[str]]:
    """Every target that the recipe promises, and at least one."""
    try:
        reports = load_budgets(artifact.path, artifact.digest)
    except ArtifactError as error:
        return (), [str(error).rstrip(".")]
    faults = [f"budget of {r.target}: {' '.join(r.broken).rstrip('.')}" for r in reports if r.broken]
    promised = artifact.manifest.recipe.targets
    missing = [target for target in promised if target not in {r.target for r in reports}]
    faults += [f"it has no budget report for {t}; run `bagel-compress budget --target {t}`" for t in missing]
    if not reports and not promised:
        faults.append("it has no budget report; run `bagel-compress budget`")
    return tuple(reports), faults


def _own_files(parity: ParityReport | None, budgets: tuple[BudgetReport, ...]) -> tuple[str, ...]:
    """Only the reports that belong to this build."""
    own = [f"{REPORTS}/budget-{b.target}.json" for b in budgets]
    return tuple(([f"{REPORTS}/{PARITY}"] if parity else []) + own)
