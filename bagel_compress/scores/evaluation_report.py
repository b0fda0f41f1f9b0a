"""The report of a published benchmark on a model: scores with intervals, beside the official figures and a reference.

It says by whom and on what it was measured, and everything in which the run was not the official one, so that no reader
takes a figure for more than it is. A copy lies beside the build with the build's digest; the page, the summary and the
model card show what `load_evaluations` reads there.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from bagel_compress.errors import ArtifactError
from bagel_compress.io.atomic import write_atomic
from bagel_compress.io.yaml_model import FrozenModel
from bagel_compress.parity.report_data import NAME, REPORTS, Number, read_json, write_json

REPORT, PAGE = "report.json", "report.md"
_PREFIX = "evaluation-"  # of the copy beside a build


class Score(FrozenModel):
    """A figure with its interval, the official one, and the paired difference to the reference."""

    name: str
    value: Number
    low: Number
    high: Number
    units: int
    official: Number | None = None
    delta: Number | None = None
    delta_low: Number | None = None
    delta_high: Number | None = None

    @property
    def worse(self) -> bool:
        """Whether it is below the reference by more than chance explains."""
        return self.delta_high is not None and self.delta_high < 0


class JudgeUse(FrozenModel):
    """What a judge was asked and what it cost. `unreadable`: answers without a score, left out of the averages."""

    model: str
    host: str
    answers: int
    unreadable: int
    prompt_tokens: int
    completion_tokens: int
    cost: Number | None = None  # in the currency of the prices that were given


class EvaluationReport(FrozenModel):
    """One benchmark on one model."""

    benchmark: str = Field(pattern=NAME)
    title: str
    model: str
    digest: str  # of the artifact, export or checkpoint
    measured_by: str
    measured_on: str
    differs: tuple[str, ...]  # where the run is not the official one
    items: int
    skipped: tuple[str, ...]
    scores: tuple[Score, ...]
    reference: str = ""
    judge: JudgeUse | None = None
    notes: tuple[str, ...] = ()

    @property
    def worse(self) -> list[Score]:
        """Scores below the reference by more than chance explains."""
        return [score for score in self.scores if score.worse]

    @property
    def main_scores(self) -> list[Score]:
        """Those with an official figure; the first where there are none."""
        return [score for score in self.scores if score.official is not None] or list(self.scores[:1])

    def public(self) -> EvaluationReport:
        """Without paths of this machine and the judge's address: the copy beside an artifact, which is published."""
        judge = self.judge and self.judge.model_copy(update={"host": ""})
        left_out = (f"Items left out: {len(self.skipped)}.",) if self.skipped else ()
        own = {"model": Path(self.model).name, "skipped": (), "judge": judge, "notes": (*self.notes, *left_out)}
        return self.model_copy(update=own)

    def attach(self, build: Path) -> Path:
        """Writes the published copy, reports/evaluation-BENCHMARK.json, under the build's folder."""
        return write_json(self.public(), build / REPORTS / f"{_PREFIX}{self.benchmark}.json")

    def save(self, out: Path) -> None:
        """Writes report.json and report.md."""
        write_json(self, out / REPORT)
        write_atomic(out / PAGE, self.markdown())

    def markdown(self) -> str:
        """For a person, a CI step and the model card."""
        lines = [f"### {self.title}: {self.model}", "", "| score | value | 95 % | units | official | difference |",
                 "|---|---|---|---|---|---|"]  # fmt: skip
        for s in self.scores:
            official = "" if s.official is None else f"{s.official:g}"
            delta = "" if s.delta is None else f"{s.delta:+.2f} ({s.delta_low:+.2f} to {s.delta_high:+.2f})"
            lines.append(
                f"| {s.name} | {s.value:.2f} | {s.low:.2f} to {s.high:.2f} | {s.units} | {official} | {delta} |"
            )
        lines += ["", f"Measured by {self.measured_by} on {self.measured_on}; {self.items} items."]
        lines += [f"Differences are to {self.reference}, paired by unit."] if self.reference else []
        if self.judge:
            j = self.judge
            cost = "" if j.cost is None else f", cost {j.cost:.2f}"
            lines.append(
                f"Judge: {j.model} at {j.host}, {j.answers} answers, {j.unreadable} unreadable,"
                f" {j.prompt_tokens + j.completion_tokens} tokens{cost}."
            )
        lines += [f"Not the official run: {'; '.join(self.differs)}."] if self.differs else []
        lines += [f"{len(self.skipped)} items left out: {'; '.join(self.skipped[:3])}."] if self.skipped else []
        return "\n".join([*lines, *self.notes]) + "\n"


def load_evaluations(build: Path, digest: str | None = None) -> list[EvaluationReport]:
    """The evaluations of a build. Raises ArtifactError on one that is none, or is of another build than `digest`."""
    found = []
    for path in sorted((build / REPORTS).glob(f"{_PREFIX}*.json")):
        report: EvaluationReport = read_json(EvaluationReport, path)
        if path.name != f"{_PREFIX}{report.benchmark}.json":
            raise ArtifactError(f"{path} is about {report.benchmark}; run `bagel-compress evaluate` again.")
        if digest is not None and report.digest != digest:
            raise ArtifactError(
                f"{path} belongs to another build ({report.digest[:12]}, this one is {digest[:12]}); run"
                " `bagel-compress evaluate` again or remove it."
            )
        found.append(report)
    return found
