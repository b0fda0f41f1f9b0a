"""The section of report.html on budgets: memory phase by phase, and times. Returns escaped HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bagel_compress.parity.report_data import BudgetReport
from bagel_compress.report.svg import COLOURS, stacked

MIB, GIB = 2.0**20, 2.0**30


def budget_section(budgets: Sequence[BudgetReport]) -> str:
    """Bars for every phase on every target, and a table of measured times; empty without budgets."""
    blocks = []
    for budget in budgets:
        scale = max([p.total for p in budget.phases] + [budget.limit or 0.0]) * 1.02
        rows = []
        for phase in budget.phases:
            measured = "" if phase.measured is None else f", measured {_size(phase.measured)}"
            bar = stacked(list(phase.parts.items()), scale, budget.limit)
            rows.append(f"<p><small>{escape(phase.name)}: {_size(phase.total)}{measured}</small></p>{bar}")
        names = list(dict.fromkeys(name for p in budget.phases for name in p.parts))
        legend = "".join(
            f"<span><i style='background:var(--c{i % COLOURS})'></i>{escape(n)}</span>" for i, n in enumerate(names)
        )
        limit = "" if budget.limit is None else f", limit {_size(budget.limit)}"
        advice = "".join(f"<p>{escape(a)}</p>" for a in budget.advice) + _times(budget)
        blocks.append(
            f"<h3>{escape(budget.target)} <small class='soft'>{escape(budget.device)}{limit}</small></h3>"
            f"{''.join(rows)}<div class='legend'>{legend}</div>{advice}"
        )
    title = "Memory and speed" if any(b.timings for b in budgets) else "Memory"
    return f"<h2>{title}</h2>" + "".join(blocks) if blocks else ""


def _times(budget: BudgetReport) -> str:
    """A table of the measured times, with the reference's and the device; empty without times."""
    if not budget.timings:
        return ""
    rows = "".join(
        f"<tr><td>{escape(t.what)}</td><td class='n' data-is='median'>{_seconds(t.median)}</td>"
        f"<td class='n' data-is='90 % below'>{_seconds(t.p90)}</td>"
        f"<td class='n' data-is='reference'>{'' if t.reference is None else _seconds(t.reference)}</td>"
        f"<td class='n' data-is='ratio'>{'' if t.ratio is None else f'{t.ratio:.2f}'}</td></tr>"
        for t in budget.timings
    )
    head = "".join(f"<th class='n'>{h}</th>" for h in ("median", "90 % below", "reference", "ratio"))
    return (
        f"<p><small>Times measured on {escape(budget.timed_on or 'an unknown device')}</small></p>"
        f"<div class='scroll'><table class='rows'><tr><th>time</th>{head}</tr>{rows}</table></div>"
    )


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _size(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.1f} MiB"
