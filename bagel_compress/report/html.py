"""report.html: a parity report as one self-contained page: verdict, numbers, pictures, texts and curves.

The page loads nothing and has no scripts: pictures are embedded, charts are inline SVG. Prompts, texts and names are
escaped.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

import numpy as np
from PIL import Image

from bagel_compress.build.limits import METRICS, Metric
from bagel_compress.build.sizes import SizeGroup
from bagel_compress.io.byte_size import size_text
from bagel_compress.parity.report_data import BudgetReport, CaseParity, ParityReport, Row, number
from bagel_compress.report.benchmarks import benchmark_section
from bagel_compress.report.memory_page import budget_section
from bagel_compress.report.rounding_page import rounding_section
from bagel_compress.report.svg import Points, bars, line_chart
from bagel_compress.report.text import fitting, loss, worst_rows
from bagel_compress.scores.evaluation_report import EvaluationReport

WORST_MODULES = 12
BRIGHT, BRIGHT_SHARE, MAX_GAIN = 160, 0.99, 64  # a difference picture is scaled to have its 99 % quantile near 160
SMALL = 200  # pictures narrower than this many pixels are enlarged; the page shows them about 350 wide
BRANCHES = ("guided", "cond", "text", "image")  # velocities of a step, in the order of their colours


def render(
    report: ParityReport,
    pictures: Mapping[str, Sequence[bytes]],
    budgets: Sequence[BudgetReport] = (),
    sizes: Sequence[SizeGroup] = (),
    evaluations: Sequence[EvaluationReport] = (),
) -> str:
    """The page. `pictures`: case -> PNG files of reference, artifact, difference, inputs; `sizes`: the build's."""
    sections = [
        _head(report),
        _overview(report, budgets, sizes),
        _verdict(report, budgets),
        budget_section(budgets),
        _summary(report),
        benchmark_section(evaluations),
        _pictures(report, pictures),
        _texts(report),
        _steps(report),
        _layers(report),
        _components(report),
        rounding_section(report.rounding),
        _modules(report),
        _about(report),
    ]
    template = files("bagel_compress.report").joinpath("page.html.in").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(f"{report.name}: parity"), body="\n".join(filter(None, sections)))


def _head(report: ParityReport) -> str:
    return (
        f"<h1>{escape(report.name)}</h1><p class='soft'>compared with its source"
        f" ({escape(report.source)}) in {len(report.cases)} cases,"
        f" class {escape(report.level)}, build {escape(report.artifact[:12])}</p>"
    )


def _overview(report: ParityReport, budgets: Sequence[BudgetReport], sizes: Sequence[SizeGroup]) -> str:
    """The build in a few sentences: size, formats, the targets it fits, how its output differs."""
    lines = [text for text in (fitting(budgets), loss(report)) if text]
    if sizes:
        stored, source = sum(g.nbytes for g in sizes), sum(g.source_bytes for g in sizes)
        bits = 8 * stored / sum(g.parameters for g in sizes)
        by_codec: dict[str, int] = {}
        for group in sizes:
            by_codec[group.codec] = by_codec.get(group.codec, 0) + group.nbytes
        largest_first = sorted(by_codec.items(), key=lambda item: -item[1])
        formats = ", ".join(f"{name} {n / stored:.0%}" for name, n in largest_first)
        lines.insert(
            0,
            f"{size_text(stored)} of weights, {stored / source:.0%} of the source's; {bits:.2f} bits each ({formats}).",
        )
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _verdict(report: ParityReport, budgets: Sequence[BudgetReport]) -> str:
    reasons = [*report.faults, *report.broken, *(s for b in budgets for s in b.broken)]
    if not reasons:
        text = f"All {len(report.rows)} values are within their limits."
        return f"<div class='verdict pass'><strong>Passed</strong><p>{text}</p></div>"
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f"<div class='verdict fail'><strong>Did not pass</strong><ul>{items}</ul></div>"


def _summary(report: ParityReport) -> str:
    """A table of the worst case of each metric, and one of all values, folded."""
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
            f"<td class='n' data-is='found'>{_show(row.value)}{_to_limit(row)}</td>"
            f"<td class='n' data-is='floor'>{floor}</td>"
            f"<td class='n' data-is='limit'>{side} {_show(row.limit)}{source}</td>"
            f"<td class='{'ok' if row.ok else 'no'}'>{'holds' if row.ok else 'broken'}</td></tr>"
        )
    head = "<tr><th>value</th><th class='n'>found</th><th class='n'>floor</th><th class='n'>limit</th><th></th></tr>"
    return f"<div class='scroll'><table class='rows'>{head}{''.join(lines)}</table></div>"


def _to_limit(row: Row) -> str:
    """A bar for the share of its limit that a value uses; full if the limit is reached or broken."""
    small, large = (row.value, row.limit) if METRICS[row.metric].sense == "max" else (row.limit, row.value)
    if METRICS[row.metric].sense == "min" and row.limit <= 1:  # a similarity of at most 1: compare what is missing to 1
        small, large = 1 - row.value, 1 - row.limit
    share = 1.0 if not row.ok else 0.0 if small <= 0 or large in (0.0, math.inf) else min(1.0, small / large)
    kind = "" if row.ok else " class='over'"
    return f"<div class='bar' title='{share:.0%} of the limit'><i{kind} style='width:{share:.0%}'></i></div>"


def _show(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.3g}"


def _pictures(report: ParityReport, pictures: Mapping[str, Sequence[bytes]]) -> str:
    blocks = []
    for case in report.cases:
        if case.name not in pictures:
            continue
        reference, found, _, *inputs = pictures[case.name]
        difference, gain = _difference(reference, found)
        images = "".join(
            f"<figure><img{_small(png)} alt='{escape(case.name)}: {what}' src='{embedded(png)}'>"
            f"<figcaption>{what}</figcaption></figure>"
            for what, png in (
                *(("input", png) for png in inputs),
                ("reference", reference),
                ("artifact", found),
                (f"difference &times;{gain}", difference),
            )
        )
        columns = "three more" if inputs else "three"
        metrics = case.metrics
        shown = {
            "PSNR": (Metric.IMAGE_PSNR, " dB"), "SSIM": (Metric.IMAGE_SSIM, ""),
            "mean difference": (Metric.IMAGE_MAE, " of 255"), "LPIPS": (Metric.IMAGE_LPIPS, ""),
            "CLIP score": (Metric.IMAGE_CLIP, ""),
        }  # fmt: skip
        caption = ", ".join(
            f"{label} {_show(metrics[metric])}{unit}" for label, (metric, unit) in shown.items() if metric in metrics
        ).replace("equal dB", "equal")
        blocks.append(
            f"<div class='case'><h3>{escape(case.name)} <small class='soft'>{escape(case.kind)}</small></h3>"
            f"<p class='soft'>{escape(case.prompt)}</p><div class='{columns}'>{images}</div>"
            f"<p><small>{caption}</small></p></div>"
        )
    return "<h2>Pictures</h2>" + "".join(blocks) if blocks else ""


def _difference(reference: bytes, found: bytes) -> tuple[bytes, int]:
    """The absolute difference times a gain as PNG, and the gain: a power of two that makes 1 % of the values bright."""
    a, b = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int32) for png in (reference, found))
    difference = np.abs(a - b)
    bright = max(float(np.quantile(difference, BRIGHT_SHARE)), 1.0)
    gain = max(1, min(MAX_GAIN, 1 << int(math.log2(BRIGHT / bright)))) if bright < BRIGHT else 1
    out = io.BytesIO()
    Image.fromarray((difference * gain).clip(0, 255).astype(np.uint8)).save(out, "PNG", optimize=True)
    return out.getvalue(), gain


def _small(png: bytes) -> str:
    """The CSS class of pictures that the page enlarges, which keeps their pixels sharp; empty for others."""
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
    """The text escaped for HTML, with visible control characters."""
    return escape("".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)) or "&nbsp;"


def _steps(report: ParityReport) -> str:
    charts: dict[str, dict[str, Points]] = {}
    for case in report.cases:
        lines: dict[str, list[tuple[float, float]]] = {branch: [] for branch in BRANCHES}
        for step in case.steps:
            lines[step.branch].append((step.t, step.rel_l2))
        charts[case.name] = dict(lines)
    drawn = _charts(charts, "time, from noise (1) to picture (0)", reverse=True)
    note = (
        "<p class='soft'>Relative L2 error of the velocity at each recorded step, fed with the reference's x. Single"
        " steps are not limited: later steps correct most of what early ones do wrong, and near 0 a small error of the"
        " picture is a large one of the velocity.</p>"
    )
    return f"<h2>Error along the denoising</h2>{note}<div class='charts'>{drawn}</div>" if drawn else ""


def _layers(report: ParityReport) -> str:
    charts: dict[str, dict[str, Points]] = {}
    for case in report.cases:
        lines: dict[str, list[tuple[float, float]]] = {}
        for state in case.states:
            if state.name.startswith("layer"):
                layer = float(state.name.removeprefix("layer"))
                lines.setdefault(state.event.lstrip("0123456789_") or state.event, []).append((layer, state.rel_l2))
        drift = f" (drift begins at {case.drift})" if case.drift and not report.passed else ""
        charts[case.name + drift] = dict(_distinct(case, lines))
    drawn = _charts(charts, "layer")
    note = "<p class='soft'>Relative L2 error of the state after each layer, at each event of a case.</p>"
    return f"<h2>Error along the layers</h2>{note}<div class='charts'>{drawn}</div>" if drawn else ""


def _charts(charts: Mapping[str, Mapping[str, Points]], x_label: str, reverse: bool = False) -> str:
    """One line chart per title, all with the same y axis."""
    scale = [y for lines in charts.values() for line in lines.values() for _, y in line if 0 < y < math.inf]
    drawn = (line_chart(title, x_label, lines, reverse=reverse, scale=scale) for title, lines in charts.items())
    return "".join(filter(None, drawn))


def _distinct(case: CaseParity, lines: Mapping[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    """Splits lines that hold several events of one kind (two prefilled pictures) into one line per event."""
    layers = len({s.name for s in case.states if s.name.startswith("layer")})
    split: dict[str, list[tuple[float, float]]] = {}
    for name, points in lines.items():
        runs = [points[i : i + layers] for i in range(0, len(points), max(layers, 1))]
        split |= {name if len(runs) == 1 else f"{name} {i + 1}": run for i, run in enumerate(runs)}
    return split


def _components(report: ParityReport) -> str:
    if not report.shares:
        return ""
    blocks = []
    for title, field in (("velocities (error of the path)", "velocity"), ("logits (mean KL)", "logits")):
        rows = [(s.component, getattr(s, field)) for s in report.shares]
        if any(v is not None for _, v in rows):
            text = [(c, v, "" if v is None else "0" if v == 0 else number(v)) for c, v in rows]
            blocks.append(f"<h3>{title}</h3>{bars(text)}")
    note = (
        "<p class='soft'>Error of the reference when this one component is taken from the artifact and everything else"
        " is unchanged.</p>"
    )
    return "<h2>Error by component</h2>" + note + "".join(blocks)


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


def _about(report: ParityReport) -> str:
    environment = "; ".join(f"{name} {value}" for name, value in report.environment.items())
    notes = "".join(f"<p class='soft'><small>{escape(note)}</small></p>" for note in report.notes)
    return (
        f"<h2>About</h2><p class='soft'><small>{escape(environment)}</small></p>{notes}"
        f"<p class='soft'><small>source digest {escape(report.source_digest)}<br>"
        f"manifest sha256 {escape(report.artifact)}</small></p>"
    )


def embedded(png: bytes) -> str:
    """A PNG picture as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
