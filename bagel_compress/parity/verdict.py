"""Verdict: the rows of a report, made of its cases and of limits alone, and what was not measured.

A comparison makes its rows here, and a gate makes them again from the report's cases and the recipe's own limits: what
a report says of itself (`ok`, limits, which limits there are) is never taken on trust. A limit without a value does not
hold, and the cases have to cover every task of the model, because a build may be right in one and wrong in another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from bagel_compress.build.limits import Limit, Metric, resolve
from bagel_compress.parity.extremes import largest, middle, smallest
from bagel_compress.parity.report_data import CaseParity, ParityReport, Row

FLOOR_OF = {"lossless": ("repeat",)}  # a lossless model is run exactly as the reference was
FLOOR_KINDS = ("kernel", "dtype")
PRESET = ", preset "  # in the case of a row: the case, and the preset that it was drawn with
OF_MODULES = (Metric.LINEAR_GAIN, Metric.LINEAR_BIAS)  # of probes of single modules, which graphs do not have
# A value that some texts do not have, where the reference is sure of no token; measured together with the other.
ONLY_SOMETIMES = {Metric.LOGITS_TOP1_SURE: Metric.LOGITS_KL_MEAN}
TASKS = {
    "t2i": "a text to image case",
    "edit": "an edit",
    "understand": "a question about a picture",
    "think": "a case with `think`",
}


def floor_of(by_kind: Mapping[str, float], limit: Limit, level: str) -> float | None:
    """The noise floor of a limit: the worst of the reference's distances from itself that count for this class."""
    values = [by_kind[kind] for kind in FLOOR_OF.get(level, FLOOR_KINDS) if kind in by_kind]
    if not values:
        return None
    return largest(values) if limit.sense == "max" else smallest(values)


def summary(limit: Limit, values: Sequence[float]) -> float:
    """What a limit is compared with, over cases: the median for free runs, the worst otherwise."""
    if limit.metric.over_cases_by_median:
        return middle(values)
    return largest(values) if limit.sense == "max" else smallest(values)


def make_rows(
    limits: Mapping[str, Limit], level: str, cases: Sequence[CaseParity], probes: Mapping[str, float]
) -> tuple[Row, ...]:
    """One row per limit and case, or per limit where the median over the cases or the modules' probes count."""
    rows = []
    for metric, limit in limits.items():
        if metric in probes:
            rows.append(_row("", metric, probes[metric], None, limit))
            continue
        measured = [(c, c.metrics[metric]) for c in cases if metric in c.metrics]
        floors = {c.name: floor_of(c.floor.get(metric, {}), limit, level) for c, _ in measured}
        if limit.metric.over_cases_by_median and measured:
            known = [f for f in floors.values() if f is not None]
            value = middle([v for _, v in measured])
            rows.append(_row("", metric, value, middle(known) if known else None, limit))
        else:
            rows += [_row(c.name, metric, v, floors[c.name], limit) for c, v in measured]
    return tuple(rows)


def preset_limits(level: str, limits: Mapping[str, Limit]) -> dict[str, Limit]:
    """The limits of what is drawn with a preset: of latent and picture. A lossless build's are those of 16 bits,
    since no preset draws equal bits."""
    chosen = resolve("16-bit", {}) if level == "lossless" else limits
    return {metric: limit for metric, limit in chosen.items() if metric.startswith(("latent.", "image."))}


def not_measured(
    limits: Mapping[str, Limit], rows: Sequence[Row], cases: Sequence[CaseParity], has_modules: bool
) -> tuple[str, ...]:
    """One sentence per task without a case and per limit without a value."""
    kinds = {part for case in cases for part in case.kind.split(" + ")}
    found = [f"The cases hold no {words.split(' ', 1)[1]}." for task, words in TASKS.items() if task not in kinds]
    known = {row.metric for row in rows}
    known |= {metric for metric, other in ONLY_SOMETIMES.items() if other in known}
    exempt = () if has_modules else OF_MODULES
    found += [f"{m} has a limit and was not measured." for m in limits if m not in known and m not in exempt]
    if found:
        found.append("Record the missing cases (exports/cases has one of each kind) and validate with all traces.")
    return tuple(found)


def judged_again(
    report: ParityReport,
    limits: Mapping[str, Limit],
    level: str,
    has_modules: bool,
    presets: Collection[str] = (),
) -> list[str]:
    """Everything that keeps a report from passing under these limits; its values alone are believed.

    `presets`: those of the recipe, which are held to limits of their own.
    """
    if report.level != level:
        return [f"It was judged as class {report.level}, the recipe's is {level}; validate again."]
    probes = {row.metric: row.value for row in report.rows if row.metric in OF_MODULES and not row.case}
    faster = [row for row in report.rows if PRESET in row.case]
    rows = (*make_rows(limits, level, report.cases, probes), *_again(faster, preset_limits(level, limits)))
    if [row.model_dump_json() for row in rows] != [row.model_dump_json() for row in report.rows]:
        return ["Its rows are not those of its cases under the recipe's limits; validate again."]
    missing = list(not_measured(limits, rows, report.cases, has_modules))
    for preset in presets:
        known = {row.metric for row in faster if row.case.endswith(f"{PRESET}{preset}")}
        missing += [f"{m} of preset {preset} was not measured." for m in preset_limits(level, limits) if m not in known]
    again = report.model_copy(update={"missing": tuple(missing)})
    return [*again.faults, *again.broken]


def _again(rows: Sequence[Row], limits: Mapping[str, Limit]) -> list[Row]:
    """Rows of presets under these limits; those of other metrics are left out."""
    return [_row(row.case, row.metric, row.value, None, limits[row.metric]) for row in rows if row.metric in limits]


def _row(case: str, metric: str, value: float, floor: float | None, limit: Limit) -> Row:
    ok = limit.holds(value)
    return Row(case=case, metric=metric, value=value, floor=floor, limit=limit.value, source=limit.source, ok=ok)
