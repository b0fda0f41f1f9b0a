"""Applies limits to measured values: makes the rows of a report, and lists what was not measured.

A comparison makes its rows here. Before publishing, they are made again from the report's measured values and the
recipe's limits, since a report's own statements about limits (`ok`, their values, which there are) are not trusted. A
limit without a value fails, and the cases have to cover every task of the model, since a build may be right in one task
and wrong in another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from bagel_compress.build.limits import Limit, Metric, resolve
from bagel_compress.parity.extremes import largest, middle, smallest
from bagel_compress.parity.report_data import PRESET, CaseParity, ParityReport, Row

FLOOR_OF = {"lossless": ("repeat",)}  # a lossless model has to reproduce an unchanged repetition of the reference
FLOOR_KINDS = ("kernel", "dtype")  # the changes that count for the noise floor of all other classes
MODULE_METRICS = (Metric.LINEAR_GAIN, Metric.LINEAR_BIAS)  # from probes of single modules, which graphs do not have
# A metric without a value where the reference is sure of no token -> a metric that is measured whenever it could be.
OPTIONAL_METRICS = {Metric.LOGITS_TOP1_SURE: Metric.LOGITS_KL_MEAN}
TASKS = {
    "t2i": "a text to image case",
    "edit": "an edit",
    "understand": "a question about a picture",
    "think": "a case with `think`",
}


def floor_of(by_kind: Mapping[str, float], limit: Limit, level: str) -> float | None:
    """The noise floor of a limit: the worst of the reference's distances from itself that count for this class.

    `by_kind` maps kinds of change (record.FLOORS) to distances. None if none of them was recorded.
    """
    values = [by_kind[kind] for kind in FLOOR_OF.get(level, FLOOR_KINDS) if kind in by_kind]
    if not values:
        return None
    return largest(values) if limit.sense == "max" else smallest(values)


def summary(limit: Limit, values: Sequence[float]) -> float:
    """The value over all cases that a limit is compared with: the median for free runs, the worst otherwise."""
    if limit.metric.over_cases_by_median:
        return middle(values)
    return largest(values) if limit.sense == "max" else smallest(values)


def make_rows(
    limits: Mapping[str, Limit], level: str, cases: Sequence[CaseParity], probes: Mapping[str, float]
) -> tuple[Row, ...]:
    """One row per limit and case; one per limit if it applies to the median over the cases or to the module probes."""
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
    """The limits that apply to runs with a preset: those of latent and picture.

    For a lossless build they are those of class "16-bit", since a preset changes the bits of every picture.
    """
    chosen = resolve("16-bit", {}) if level == "lossless" else limits
    return {metric: limit for metric, limit in chosen.items() if metric.startswith(("latent.", "image."))}


def not_measured(
    limits: Mapping[str, Limit], rows: Sequence[Row], cases: Sequence[CaseParity], has_modules: bool
) -> tuple[str, ...]:
    """One sentence per task without a case and per limit without a value."""
    kinds = {part for case in cases for part in case.kind.split(" + ")}
    found = [f"The cases hold no {name.split(' ', 1)[1]}." for task, name in TASKS.items() if task not in kinds]
    known = {row.metric for row in rows}
    known |= {metric for metric, other in OPTIONAL_METRICS.items() if other in known}
    exempt = () if has_modules else MODULE_METRICS
    found += [f"{m} has a limit and was not measured." for m in limits if m not in known and m not in exempt]
    if found:
        found.append("Record the missing cases (exports/cases has one of each kind) and validate with all traces.")
    return tuple(found)


def recheck(
    report: ParityReport,
    limits: Mapping[str, Limit],
    level: str,
    has_modules: bool,
    presets: Collection[str] = (),
) -> list[str]:
    """Applies the limits to a report's values again; returns one sentence per reason why the report does not pass.

    Only the measured values of the report are used. `presets` are those of the recipe; each must have been measured.
    """
    if report.level != level:
        return [f"It was validated as class {report.level}, the recipe's is {level}; validate again."]
    probes = {row.metric: row.value for row in report.rows if row.metric in MODULE_METRICS and not row.case}
    with_preset = [row for row in report.rows if PRESET in row.case]
    rows = (*make_rows(limits, level, report.cases, probes), *_limited(with_preset, preset_limits(level, limits)))
    if [row.model_dump_json() for row in rows] != [row.model_dump_json() for row in report.rows]:
        return ["Its rows are not those of its cases under the recipe's limits; validate again."]
    missing = list(not_measured(limits, rows, report.cases, has_modules))
    for preset in presets:
        known = {row.metric for row in with_preset if row.case.endswith(f"{PRESET}{preset}")}
        missing += [f"{m} of preset {preset} was not measured." for m in preset_limits(level, limits) if m not in known]
    checked = report.model_copy(update={"missing": tuple(missing)})
    return [*checked.faults, *checked.broken]


def _limited(rows: Sequence[Row], limits: Mapping[str, Limit]) -> list[Row]:
    """The rows with these limits applied; rows of metrics without a limit are left out."""
    return [_row(row.case, row.metric, row.value, None, limits[row.metric]) for row in rows if row.metric in limits]


def _row(case: str, metric: str, value: float, floor: float | None, limit: Limit) -> Row:
    ok = limit.holds(value)
    return Row(case=case, metric=metric, value=value, floor=floor, limit=limit.value, source=limit.source, ok=ok)
