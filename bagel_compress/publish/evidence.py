"""Evidence: the reports of an artifact as a release needs them, and everything that keeps it from being one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bagel_compress.artifact import Artifact
from bagel_compress.errors import ArtifactError
from bagel_compress.reports import PARITY, REPORTS, BudgetReport, ParityReport, load_budgets

PAGE = "report.html"


@dataclass(frozen=True)
class Evidence:
    """Reports that carry the artifact's digest. `files` are their paths under the artifact, `pictures` case -> path."""

    parity: ParityReport | None = None
    budgets: tuple[BudgetReport, ...] = ()
    files: tuple[str, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)

    def prompt(self, case: str) -> str:
        """The prompt of a case, empty if the report does not know it."""
        cases = self.parity.cases if self.parity else ()
        return next((c.prompt for c in cases if c.name == case), "")


def load_evidence(artifact: Artifact) -> tuple[Evidence, list[str]]:
    """The reports, and one phrase for each that is missing, stale or not passed.

    A report of another build is named and left out, and with it everything that could be drawn from it.
    """
    parity, faults = _parity(artifact)
    budgets, more = _budgets(artifact)
    if parity is None or (more and any("another build" in fault for fault in more)):
        return Evidence(parity, budgets, _own_files(parity, budgets)), faults + more
    folder = artifact.path
    files = sorted(p.relative_to(folder).as_posix() for p in (folder / REPORTS).rglob("*") if p.is_file())
    files += [PAGE] if (folder / PAGE).is_file() else []
    pictures = {c.name: f"{REPORTS}/{c.name}.png" for c in parity.cases if f"{REPORTS}/{c.name}.png" in files}
    return Evidence(parity, budgets, tuple(files), pictures), faults + more


def _parity(artifact: Artifact) -> tuple[ParityReport | None, list[str]]:
    if not (artifact.path / REPORTS / PARITY).is_file():
        return None, ["it has no parity report; run `bagel-compress validate`"]
    try:
        report = ParityReport.load(artifact.path, artifact.digest)
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
