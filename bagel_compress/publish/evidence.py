"""Evidence: the reports of an artifact as a release needs them, and everything that keeps it from being one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bagel_compress.artifact import Artifact
from bagel_compress.errors import ArtifactError
from bagel_compress.reports import PARITY, REPORTS, ParityReport

PICTURES = (".png", ".jpg", ".webp")


@dataclass(frozen=True)
class Peak:
    """Peak device memory of one task in bytes; `measured` is None where no such card was at hand."""

    task: str
    predicted: float | None
    measured: float | None
    fits: bool


@dataclass(frozen=True)
class Speed:
    """A measured time, in words, and its ratio to the reference in the same process."""

    what: str
    value: str
    reference: str


@dataclass(frozen=True)
class Budget:
    """One target: the card, what it may use, what the artifact needs there."""

    target: str
    device: str
    limit: float | None
    peaks: tuple[Peak, ...]
    speeds: tuple[Speed, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """Reports that carry the artifact's digest. `files` are their paths under the artifact, `pictures` case -> path."""

    parity: ParityReport | None = None
    budgets: tuple[Budget, ...] = ()
    files: tuple[str, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)

    def prompt(self, case: str) -> str:
        """The prompt of a case, empty if the report does not know it."""
        cases = self.parity.cases if self.parity else ()
        return next((c.prompt for c in cases if c.name == case), "")


def load_evidence(artifact: Artifact) -> tuple[Evidence, list[str]]:
    """The reports, and one phrase for each that is missing, stale or not passed."""
    parity, faults = _parity(artifact)
    folder = artifact.path / REPORTS
    files = sorted(p.relative_to(artifact.path).as_posix() for p in folder.rglob("*") if p.is_file())
    pictures = {Path(f).stem: f for f in files if f.endswith(PICTURES)}
    return Evidence(parity, (), tuple(files), pictures), faults


def _parity(artifact: Artifact) -> tuple[ParityReport | None, list[str]]:
    if not (artifact.path / REPORTS / PARITY).is_file():
        return None, ["it has no parity report; run `bagel-compress validate`"]
    try:
        report = ParityReport.load(artifact.path, artifact.digest)
    except ArtifactError as error:
        return None, [str(error).rstrip(".")]
    why = " ".join([*report.faults, *report.broken]).rstrip(".")
    return report, [] if report.passed else [f"parity did not pass: {why}"]
