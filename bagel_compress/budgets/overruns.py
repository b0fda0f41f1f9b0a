"""Overruns: limits of a target that the numbers of a budget report break. No torch, since publishing uses it too."""

from __future__ import annotations

from collections.abc import Iterator

from bagel_compress.parity.report_data import IMAGE, STEP, TOKEN, BudgetReport
from bagel_compress.run.target import GIB, Target


def overruns(report: BudgetReport, target: Target | None) -> tuple[str, ...]:
    """One sentence per broken limit. Without the target, only limits that the report itself contains are checked."""
    return (*_too_large(report), *(() if target is None else _too_slow(report, target)))


def _too_large(report: BudgetReport) -> Iterator[str]:
    needed, name = max((max(p.total, p.measured or 0.0), p.name) for p in report.phases)
    if report.limit is not None and needed > report.limit:
        yield (
            f"{report.target}: {name} needs {needed / GIB:.2f} GiB, {report.limit / GIB:.2f} GiB are usable"
            f" on {report.device}."
        )
    if report.disk_limit is not None and report.disk > report.disk_limit:
        limit = report.disk_limit / 1e9
        yield f"{report.target}: the files take {report.disk / 1e9:.2f} GB, the limit is {limit:g} GB."


def _too_slow(report: BudgetReport, target: Target) -> Iterator[str]:
    """The broken limits on times; empty unless the times were measured on the target's own GPU."""
    times = {t.what: t for t in report.timings} if report.timed_on == target.device.name else {}
    token, limit = times.get(TOKEN), target.budget.tokens_per_second
    if token is not None and limit is not None and 1 / token.median < limit:
        yield f"{report.target}: {1 / token.median:.1f} tokens per second, the limit is {limit:g}."
    step, ratio = times.get(STEP), target.budget.step_ratio
    if step is not None and ratio is not None and step.ratio is not None and step.ratio > ratio:
        yield f"{report.target}: a step takes {step.ratio:.2f} times the reference's, the limit is {ratio:g}."
    image, seconds = times.get(IMAGE), target.budget.seconds_per_image
    if image is not None and seconds is not None and image.median > seconds:
        yield f"{report.target}: an image takes {image.median:.1f} s, the limit is {seconds:g}."
