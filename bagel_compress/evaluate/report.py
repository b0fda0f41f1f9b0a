"""The report of a benchmark on a model: scores with intervals, beside the official figures and a reference.

It says by whom and on what it was measured, and everything in which the run was not the official one, so that no reader
takes a figure for more than it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from bagel_compress.errors import ArtifactError, BenchmarkError
from bagel_compress.evaluate.values import Total, Values, difference, figure
from bagel_compress.io.atomic import write_atomic
from bagel_compress.io.yaml_model import FrozenModel
from bagel_compress.parity.report_data import NAME, REPORTS, Number, read_json, write_json

REPORT, PAGE, VALUES = "report.json", "report.md", "values.json"
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
        left_out = (f"{len(self.skipped)} items were left out.",) if self.skipped else ()
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


def load_evaluations(build: Path, digest: str) -> list[EvaluationReport]:
    """The evaluations of a build. Raises ArtifactError on one that belongs to another build, or is none."""
    found = []
    for path in sorted((build / REPORTS).glob(f"{_PREFIX}*.json")):
        report: EvaluationReport = read_json(EvaluationReport, path)
        if path.name != f"{_PREFIX}{report.benchmark}.json":
            raise ArtifactError(f"{path} is about {report.benchmark}; run `bagel-compress evaluate` again.")
        if report.digest != digest:
            raise ArtifactError(
                f"{path} belongs to another build ({report.digest[:12]}, this one is {digest[:12]}); run"
                " `bagel-compress evaluate` again or remove it."
            )
        found.append(report)
    return found


def scored(values: Values, official: Mapping[str, float], against: Values | None = None) -> tuple[Score, ...]:
    """Every figure, totals first; with `against` the paired differences. Raises BenchmarkError if they do not pair."""
    rows = []
    for name in [*values.totals, *values.values]:
        found = figure(values, name)
        row: dict[str, Any] = {"official": official.get(name)}
        if against is not None:
            delta = difference(values, against, name)
            row |= {"delta": delta.value, "delta_low": delta.low, "delta_high": delta.high}
        rows.append(Score(name=name, value=found.value, low=found.low, high=found.high, units=found.units, **row))
    return tuple(rows)


class _StoredTotal(FrozenModel):
    categories: tuple[str, ...]
    how: Any


class _StoredValues(FrozenModel):
    values: dict[str, dict[str, tuple[float, ...]]]
    totals: dict[str, _StoredTotal]


def save_values(values: Values, out: Path) -> None:
    """OUT/values.json: every unit's values, for a later comparison."""
    totals = {n: _StoredTotal(categories=t.categories, how=t.how) for n, t in values.totals.items()}
    write_json(_StoredValues(values={c: {u: tuple(v) for u, v in units.items()} for c, units in values.values.items()},
                             totals=totals), out / VALUES)  # fmt: skip


def load_values(out: Path) -> Values:
    """Raises BenchmarkError if the folder holds no scored run."""
    if not (out / VALUES).is_file():
        raise BenchmarkError(f"{out} holds no scores ({VALUES} is missing); finish and score that run first.")
    stored = read_json(_StoredValues, out / VALUES)
    return Values(stored.values, {n: Total(t.categories, t.how) for n, t in stored.totals.items()})
