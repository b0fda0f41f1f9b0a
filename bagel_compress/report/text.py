"""The parity report as JUnit XML and as a Markdown summary, and sentences that summarise it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from xml.etree import ElementTree

from bagel_compress.build.limits import METRICS, Metric
from bagel_compress.parity.report_data import BudgetReport, ParityReport, Row, number, sentence
from bagel_compress.report.benchmarks import HEAD, measured, shown
from bagel_compress.scores.evaluation_report import EvaluationReport


def junit(report: ParityReport, budgets: Sequence[BudgetReport] = ()) -> str:
    """JUnit XML with one test case per limit, per fault and per budget."""
    suite = ElementTree.Element("testsuite", name=_xml(f"bagel-compress {report.name}"))
    tests = [(row.case or "all cases", row.metric, "" if row.ok else sentence(row)) for row in report.rows]
    tests += [("diagnosis", f"fault {i + 1}", fault) for i, fault in enumerate(report.faults)]
    for budget in budgets:
        tests += [("budget", budget.target, " ".join(budget.broken))]
    for where, name, failure in tests:
        case = ElementTree.SubElement(suite, "testcase", classname=_xml(where), name=_xml(name))
        if failure:
            ElementTree.SubElement(case, "failure", message=_xml(failure))
    suite.set("tests", str(len(tests)))
    suite.set("failures", str(sum(bool(failure) for _, _, failure in tests)))
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def markdown(
    report: ParityReport, budgets: Sequence[BudgetReport] = (), evaluations: Sequence[EvaluationReport] = ()
) -> str:
    """A Markdown summary for the page of a CI run: verdict, reasons, the worst value of each metric, benchmarks."""
    reasons = [*report.faults, *report.broken, *(s for b in budgets for s in b.broken)]
    lines = [f"### {_cell(report.name)}: {'did not pass' if reasons else 'passed'}", ""]
    lines += [f"- {_cell(reason)}" for reason in reasons] + ([""] if reasons else [])
    lines += ["| value | worst case | found | floor | limit | |", "|---|---|---|---|---|---|"]
    for row in worst_rows(report):
        side = "&le;" if METRICS[row.metric].sense == "max" else "&ge;"
        floor = "" if row.floor is None else number(row.floor)
        lines.append(
            f"| {_cell(METRICS[row.metric].label)} | {_cell(row.case or 'all cases')} | {number(row.value)} | {floor} |"
            f" {side} {number(row.limit)} | {'holds' if row.ok else '**broken**'} |"
        )
    if budgets:
        lines += ["", "| target | peak | limit |", "|---|---|---|"]
        for budget in budgets:
            limit = "" if budget.limit is None else f"{budget.limit / 2**30:.2f} GiB"
            how = "measured" if budget.measured_on else "predicted"
            lines.append(f"| {_cell(budget.target)} | {budget.peak / 2**30:.2f} GiB {how} | {limit} |")
    lines += _benchmarks(evaluations)
    return "\n".join(lines) + "\n"


def _benchmarks(evaluations: Sequence[EvaluationReport]) -> list[str]:
    rows = [row for report in evaluations for row in shown(report)]
    lines = ["", f"| {' | '.join(HEAD)} |", "|---|---|---|---|---|"] if rows else []
    for row in rows:
        difference = f"{row.difference} **worse**" if row.worse else row.difference
        lines.append(f"| {_cell(row.benchmark)} | {_cell(row.score)} | {row.value} | {row.official} | {difference} |")
    return lines + ([""] if evaluations else []) + [f"- {_cell(measured(report))}" for report in evaluations]


def loss(report: ParityReport) -> str:
    """One sentence on how the build's pictures and texts differ from the reference's; empty without cases of either."""
    drawn = [c.metrics[Metric.IMAGE_PSNR] for c in report.cases if Metric.IMAGE_PSNR in c.metrics]
    same = [c.text.exact for c in report.cases if c.text is not None]
    parts = []
    if drawn and min(drawn) == math.inf:
        parts.append("every picture is the reference's, byte for byte")
    elif drawn:
        middle = (
            f"{median(drawn):.0f} dB (PSNR, the middle of {len(drawn)})" if len(drawn) > 1 else f"{drawn[0]:.0f} dB"
        )
        parts.append(f"from the same noise, its pictures are {middle} from the reference's")
    if same:
        many = "every text is" if all(same) else f"{sum(same)} of {len(same)} texts are"
        parts.append(f"{many} exactly the same")
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""


def fitting(budgets: Sequence[BudgetReport]) -> str:
    """Sentences that name the targets a build fits, with its peaks, and those it does not; empty without budgets."""
    fits = [f"{b.target} (peak {b.peak / 2**30:.2f} of {_limit(b)})" for b in budgets if not b.broken]
    not_there = [b.target for b in budgets if b.broken]
    parts = ([f"Fits {', '.join(fits)}."] if fits else []) + (
        [f"Does not fit {', '.join(not_there)}."] if not_there else []
    )
    how = "measured" if budgets and all(b.measured_on for b in budgets) else "predicted"
    return " ".join(parts) + (f" Peaks are {how}." if fits else "")


def _limit(budget: BudgetReport) -> str:
    return "unlimited memory" if budget.limit is None else f"{budget.limit / 2**30:.2f} GiB"


def worst_rows(report: ParityReport) -> list[Row]:
    """For each metric the row that is closest to its limit, or furthest beyond it."""
    worst: dict[str, Row] = {}
    for row in report.rows:
        kept = worst.get(row.metric)
        if kept is None or _beyond(row) > _beyond(kept):
            worst[row.metric] = row
    return list(worst.values())


def _beyond(row: Row) -> float:
    """By how much a value is beyond its limit (negative: within); infinite for NaN."""
    if math.isnan(row.value):
        return math.inf
    return (row.value - row.limit) * (1 if METRICS[row.metric].sense == "max" else -1)


def _xml(text: str) -> str:
    """The text without control characters, which XML does not allow."""
    return "".join(c for c in text if c.isprintable())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
