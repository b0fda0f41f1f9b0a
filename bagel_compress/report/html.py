"""report.html: a parity report as one self-contained page. Verdict first, then numbers, pictures, curves and texts.

Nothing is loaded from elsewhere and there is no script: pictures are embedded, charts are inline SVG. Everything that
comes from prompts, texts and names is escaped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from bagel_compress.build.limits import METRICS, Metric
from bagel_compress.parity.report_data import BudgetReport, CaseParity, ParityReport, Row, number
from bagel_compress.report.memory_page import budget_section
from bagel_compress.report.rounding_page import rounding_section
from bagel_compress.report.svg import bars, line_chart
from bagel_compress.report.text import worst_rows

WORST_MODULES = 12
SMALL = 200  # pixels of width; a page shows pictures about 350 wide
BRANCHES = ("guided", "cond", "text", "image")  # velocities of a step, in the order of their colours


def render(report: ParityReport, pictures: Mapping[str, Sequence[bytes]], budgets: Sequence[BudgetReport] = ()) -> str:
    """The page. `pictures`: case -> PNG files of reference, artifact and difference."""
    sections = [
        _head(report),
        _verdict(report, budgets),
        budget_section(budgets),
        _summary(report),
        _pictures(report, pictures),
        _texts(report),
        _steps(report),
        _layers(report),
        _shares(report),
        rounding_section(report.rounding),
        _modules(report),
        _colophon(report),
    ]
    template = files("bagel_compress.report").joinpath("page.html.in").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(f"{report.name}: parity"), body="\n".join(filter(None, sections)))


def _head(report: ParityReport) -> str:
    return (
        f"<h1>{escape(report.name)}</h1><p class='soft'>compared with its source"
        f" ({escape(report.source)}) in {len(report.cases)} cases,"
        f" class {escape(report.level)}, build {escape(report.artifact[:12])}</p>"
    )


def _verdict(report: ParityReport, budgets: Sequence[BudgetReport]) -> str:
    reasons = [*report.faults, *report.broken, *(s for b in budgets for s in b.broken)]
    if not reasons:
        held = len(report.rows)
        return (
            f"<div class='verdict pass'><strong>Passed</strong><p>All {held} values are within their limits.</p></div>"
        )
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f"<div class='verdict fail'><strong>Did not pass</strong><ul>{items}</ul></div>"


def _summary(report: ParityReport) -> str:
    """One line per metric with its worst case, then everything."""
    worst = worst_rows(report)
    details = "" if len(worst) == len(report.rows) else (
        f"<details><summary>all {len(report.rows)} values</summary>{_table(report.rows, True)}</details>"
    )  # fmt: skip
    return (
        "<h2>Parity</h2>" + _table(worst, False) + details
        + "<p class='soft'><small>Floor: the reference against itself, under another attention kernel and in another"
        " dtype (for a lossless class: run again in the same way).</small></p>"
    )  # fmt: skip


def _table(rows: Sequence[Row], sources: bool) -> str:
    lines = []
    for row in rows:
        metric = METRICS[row.metric]
        side = "&le;" if metric.sense == "max" else "&ge;"
        source = f"<small>{escape(row.source)}</small>" if sources else ""
        floor = "" if row.floor is None else _show(row.floor)
        lines.append(
            f"<tr><td>{escape(metric.label)}<small>{escape(row.case or 'all cases')}</small></td>"
            f"<td class='n' data-is='found'>{_show(row.value)}</td><td class='n' data-is='floor'>{floor}</td>"
            f"<td class='n' data-is='limit'>{side} {_show(row.limit)}{source}</td>"
            f"<td class='{'ok' if row.ok else 'no'}'>{'holds' if row.ok else 'broken'}</td></tr>"
        )
    head = "<tr><th>value</th><th class='n'>found</th><th class='n'>floor</th><th class='n'>limit</th><th></th></tr>"
    return f"<div class='scroll'><table class='rows'>{head}{''.join(lines)}</table></div>"


def _show(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.3g}"


def _pictures(report: ParityReport, pictures: Mapping[str, Sequence[bytes]]) -> str:
    blocks = []
    for case in report.cases:
        if case.name not in pictures:
            continue
        images = "".join(
            f"<figure><img{_small(png)} alt='{escape(case.name)}: {what}' src='data:image/png;base64,{_base64(png)}'>"
            f"<figcaption>{what}</figcaption></figure>"
            for what, png in zip(("reference", "artifact", "difference &times;4"), pictures[case.name], strict=True)
        )
        metrics = case.metrics
        caption = (
            f"PSNR {_show(metrics[Metric.IMAGE_PSNR])} {Metric.IMAGE_PSNR.unit},"
            f" SSIM {_show(metrics[Metric.IMAGE_SSIM])},"
            f" mean difference {_show(metrics[Metric.IMAGE_MAE])} {Metric.IMAGE_MAE.unit}"
            + (f", LPIPS {_show(metrics[Metric.IMAGE_LPIPS])}" if Metric.IMAGE_LPIPS in metrics else "")
            + (f", CLIP score {_show(metrics[Metric.IMAGE_CLIP])}" if Metric.IMAGE_CLIP in metrics else "")
        ).replace("equal dB", "equal")
        blocks.append(
            f"<div class='case'><h3>{escape(case.name)} <small class='soft'>{escape(case.kind)}</small></h3>"
            f"<p class='soft'>{escape(case.prompt)}</p><div class='three'>{images}</div>"
            f"<p><small>{caption}</small></p></div>"
        )
    return "<h2>Pictures</h2>" + "".join(blocks) if blocks else ""


def _small(png: bytes) -> str:
    """A class for pictures that are shown larger than they are: their pixels stay pixels."""
    return " class='small'" if int.from_bytes(png[16:20], "big") < SMALL else ""


def _texts(report: ParityReport) -> str:
    blocks = []
    for case in report.cases:
        if case.text is None:
            continue
        same = (
            "the same text"
            if case.text.exact
            else f"{case.text.prefix} of {case.text.length} tokens agree from the start"
        )
        divergence = case.metrics.get(Metric.LOGITS_KL_MEAN)
        forced = "" if divergence is None else f"; mean KL when fed the reference's text {number(divergence)}"
        blocks.append(
            f"<div class='text'><h3>{escape(case.name)} <small class='soft'>{escape(case.kind)}</small></h3>"
            f"<p class='soft'>{escape(case.prompt)}</p><p><small>{same}{forced}</small></p><div class='two'>"
            f"<div><small class='soft'>reference</small><pre>{_plain(case.text.reference)}</pre></div>"
            f"<div><small class='soft'>artifact</small><pre>{_plain(case.text.found)}</pre></div></div></div>"
        )
    return "<h2>Texts</h2>" + "".join(blocks) if blocks else ""


def _plain(text: str) -> str:
    """Escaped, with control characters made visible."""
    return escape("".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)) or "&nbsp;"


def _steps(report: ParityReport) -> str:
    charts = []
    for case in report.cases:
        lines: dict[str, list[tuple[float, float]]] = {branch: [] for branch in BRANCHES}
        for step in case.steps:
            lines[step.branch].append((step.t, step.rel_l2))
        charts.append(line_chart(case.name, "time, from noise (1) to picture (0)", lines, reverse=True))
    drawn = "".join(filter(None, charts))
    note = (
        "<p class='soft'>Relative L2 error of the velocity at each recorded step, fed with the reference's x. Single"
        " steps are not limited: later steps correct most of what early ones do wrong, and near 0 a small error of the"
        " picture is a large one of the velocity.</p>"
    )
    return f"<h2>Error along the denoising</h2>{note}<div class='charts'>{drawn}</div>" if drawn else ""


def _layers(report: ParityReport) -> str:
    charts = []
    for case in report.cases:
        lines: dict[str, list[tuple[float, float]]] = {}
        for state in case.states:
            if state.name.startswith("layer"):
                layer = float(state.name.removeprefix("layer"))
                lines.setdefault(state.event.lstrip("0123456789_") or state.event, []).append((layer, state.rel_l2))
        drift = f" (drift begins at {case.drift})" if case.drift and not report.passed else ""
        charts.append(line_chart(case.name + drift, "layer", _distinct(case, lines)))
    drawn = "".join(filter(None, charts))
    note = "<p class='soft'>Relative L2 error of the state after each layer, at each event of a case.</p>"
    return f"<h2>Error along the layers</h2>{note}<div class='charts'>{drawn}</div>" if drawn else ""


def _distinct(case: CaseParity, lines: Mapping[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    """One line per event even where two events are of one kind."""
    layers = len({s.name for s in case.states if s.name.startswith("layer")})
    split: dict[str, list[tuple[float, float]]] = {}
    for name, points in lines.items():
        runs = [points[i : i + layers] for i in range(0, len(points), max(layers, 1))]
        split |= {name if len(runs) == 1 else f"{name} {i + 1}": run for i, run in enumerate(runs)}
    return split


def _shares(report: ParityReport) -> str:
    if not report.shares:
        return ""
    blocks = []
    for title, field in (("velocities (error of the path)", "velocity"), ("logits (mean KL)", "logits")):
        rows = [(s.component, getattr(s, field)) for s in report.shares]
        if any(v is not None for _, v in rows):
            text = [(c, v, "" if v is None else "0" if v == 0 else number(v)) for c, v in rows]
            blocks.append(f"<h3>{title}</h3>{bars(text)}")
    note = "<p class='soft'>The reference with this one component taken from the artifact, all else untouched.</p>"
    return "<h2>What costs what</h2>" + note + "".join(blocks)


def _modules(report: ParityReport) -> str:
    ranked = sorted(report.modules, key=lambda m: -m.rel_l2)[:WORST_MODULES]
    if not ranked or ranked[0].rel_l2 == 0:
        return ""
    lines = "".join(
        f"<tr><td>{escape(m.module)}</td><td>{escape(m.codec)}</td><td class='n'>{number(m.rel_l2)}</td>"
        f"<td class='n'>{m.gain:.4f}</td></tr>"
        for m in ranked
    )
    head = "<tr><th>module</th><th>format</th><th class='n'>error</th><th class='n'>gain</th></tr>"
    return (
        f"<h2>Linear modules</h2><details><summary>the {len(ranked)} least exact of {len(report.modules)}</summary>"
        f"<div class='scroll'><table>{head}{lines}</table></div></details>"
    )


def _colophon(report: ParityReport) -> str:
    environment = "; ".join(f"{name} {value}" for name, value in report.environment.items())
    notes = "".join(f"<p class='soft'><small>{escape(note)}</small></p>" for note in report.notes)
    return (
        f"<h2>About</h2><p class='soft'><small>{escape(environment)}</small></p>{notes}"
        f"<p class='soft'><small>source digest {escape(report.source_digest)}<br>"
        f"manifest sha256 {escape(report.artifact)}</small></p>"
    )


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
