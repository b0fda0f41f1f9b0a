"""Published benchmarks that were run on a build: the words that the page, the summary and the model card share.

Each figure is shown with its interval. Under the table stands by whom and on what it was measured, and where the run
was not the official one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bagel_compress.parity.report_data import number
from bagel_compress.scores.evaluation_report import EvaluationReport, Score

HEAD = ("benchmark", "score", "this build (95 %)", "reported for the full model", "difference, measured (95 %)")


@dataclass(frozen=True, slots=True)
class ShownScore:
    """A row of the table, as text; empty where there is nothing to show."""

    benchmark: str
    score: str
    value: str
    official: str
    difference: str
    worse: bool


def shown(report: EvaluationReport, every: bool = False) -> list[ShownScore]:
    """The report's main scores, or with `every` all of them."""
    return [_row(report.title, score) for score in (report.scores if every else report.main_scores)]


def measured(report: EvaluationReport) -> str:
    """Items, by whom and on what, the judge, deviations from the official run, the reference of the differences."""
    words = [f"{report.title}: {report.items} items, measured by {report.measured_by} on {report.measured_on}"]
    if report.judge:
        lost = f" ({report.judge.unreadable} answers without a score)" if report.judge.unreadable else ""
        words.append(f"judged by {report.judge.model}{lost}")
    words += [f"not the official run: {'; '.join(report.differs)}"] if report.differs else []
    words += [f"differences are to {report.reference}, paired by unit"] if report.reference else []
    return "; ".join([*words, *report.notes]).rstrip(".") + "."


def benchmark_section(evaluations: Sequence[EvaluationReport]) -> str:
    """The section of report.html, escaped; empty without evaluations."""
    if not evaluations:
        return ""
    main = [row for report in evaluations for row in shown(report)]
    every = [row for report in evaluations for row in shown(report, every=True)]
    table = _table(main) if main else ""
    folded = f"<details><summary>all {len(every)} scores</summary>{_table(every)}</details>"
    notes = "".join(f"<p class='soft'><small>{escape(measured(report))}</small></p>" for report in evaluations)
    return f"<h2>Benchmarks</h2>{table}{folded if len(every) > len(main) else ''}{notes}"


def _row(title: str, s: Score) -> ShownScore:
    difference = ""
    if s.delta is not None and s.delta_low is not None and s.delta_high is not None:
        difference = f"{s.delta:+.2f} ({s.delta_low:+.2f} to {s.delta_high:+.2f})"
    official = "" if s.official is None else number(s.official)
    return ShownScore(title, s.name, f"{s.value:.2f} ({s.low:.2f} to {s.high:.2f})", official, difference, s.worse)


def _table(rows: Sequence[ShownScore]) -> str:
    head = "".join(f"<th{kind}>{name}</th>" for kind, name in zip(("", *[" class='n'"] * 3), HEAD[1:], strict=True))
    lines = []
    for row in rows:
        worse = "<small class='no'>worse</small>" if row.worse else ""
        lines.append(
            f"<tr><td>{escape(row.score)}<small>{escape(row.benchmark)}</small></td>"
            f"<td class='n' data-is='this build'>{row.value}</td>"
            f"<td class='n' data-is='reported'>{row.official}</td>"
            f"<td class='n' data-is='difference'>{row.difference}{worse}</td></tr>"
        )
    return f"<div class='scroll'><table class='rows'><tr>{head}</tr>{''.join(lines)}</table></div>"
