"""The page that compares the builds of one model by several recipes: numbers, error against size, scores, pictures."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from bagel_compress.parity.report_data import number
from bagel_compress.report.svg import scatter
from bagel_compress.validation.compare_recipes import RecipeComparison, RecipeResult, Scored

PEERS = ("nf4-official",)  # recipes that reproduce other tools' builds; shown for comparison, whatever their limits
NAMES = {"one": "one thing", "two": "two things", "ask": "answers", "edit": "edits", "think": "plans"}


def render(title: str, comparison: RecipeComparison, folder: Path, measured: str = "") -> str:
    """The page, to be written into `folder`: links to the builds' own reports are relative to it.

    `measured` is HTML of a further section, with figures that this run did not measure.
    """
    sections = [
        f"<h1>{escape(title)}</h1><p class='soft'>{len(comparison.builds)} builds against the full-precision model,"
        f" {comparison.prompts} prompts with their own noise; the same prompts and noise for all</p>",
        _verdict(comparison.builds),
        _numbers(comparison, folder),
        _pareto(comparison),
        measured,
        _scores(comparison),
        _pictures(comparison),
    ]
    template = files("bagel_compress.report").joinpath("page.html.in").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body="\n".join(sections))


def table(comparison: RecipeComparison) -> str:
    """The numbers of the page as a text table."""
    names = [name for name in NAMES if name in comparison.source.scores]
    head = f"{'recipe':<14}{'MB':>7}{'latent':>10}{'KL':>10}{'PSNR':>8}{'texts':>7}" + "".join(f"{n:>7}" for n in names)
    lines = [
        head,
        f"{'(source)':<14}{comparison.source_bytes / 1e6:>7.2f}{'':>35}" + _percents(comparison.source, names),
    ]
    for build in comparison.builds:
        values = f"{number(build.latent):>10}{number(build.kl):>10}{_decibel(build.psnr):>8}{build.equal_texts:>7.0%}"
        verdict = "" if build.report.passed else "  did not pass"
        lines.append(f"{build.name:<14}{build.nbytes / 1e6:>7.2f}{values}{_percents(build.scored, names)}{verdict}")
    return "\n".join(lines)


def _verdict(builds: Sequence[RecipeResult]) -> str:
    own = [b for b in builds if b.name not in PEERS]
    failed = [b for b in own if not b.report.passed]
    peers = "".join(
        f"<p class='soft'>{escape(b.name)} is here for comparison only"
        + ("." if b.report.passed else f"; it breaks limits of its class ({escape(b.report.broken[0].rstrip('.'))}).")
        + "</p>"
        for b in builds
        if b.name in PEERS
    )
    if not failed:
        text = "<p>Every build is within the limits of its recipe.</p>"
        return f"<div class='verdict pass'><strong>Passed</strong>{text}</div>{peers}"
    items = "".join(f"<li>{escape(b.name)}: {escape('; '.join(b.report.broken[:3]))}</li>" for b in failed)
    count = f"{len(own) - len(failed)} of {len(own)} builds are within the limits of their recipes"
    return f"<div class='verdict fail'><strong>{count}</strong><ul>{items}</ul></div>{peers}"


def _numbers(comparison: RecipeComparison, folder: Path) -> str:
    rows = "".join(
        f"<tr><td><a href='{escape(_link(b.page, folder))}'>{escape(b.name)}</a><small>{escape(b.summary)}</small></td>"
        + "".join(
            f"<td class='n' data-is='{name}'>{value}</td>"
            for name, value in (
                ("MB", f"{b.nbytes / 1e6:.2f}"),
                ("of source", f"{b.nbytes / comparison.source_bytes:.0%}"),
                ("latent", number(b.latent)),
                ("KL", number(b.kl)),
                ("PSNR", _decibel(b.psnr)),
                ("texts", f"{b.equal_texts:.0%}"),
            )
        )
        + _verdict_cell(b)
        + "</tr>"
        for b in comparison.builds
    )
    head = "".join(
        f"<th class='n'>{h}</th>" for h in ("MB", "of source", "latent error", "logits KL", "PSNR dB", "equal texts")
    )
    note = (
        "Latent error: that of the final latent, relative to the latent's distance from the noise. Medians over cases"
        " (latent, logits) and over all pictures (PSNR)."
    )
    return (
        f"<h2>Numbers</h2><div class='scroll'><table class='rows'><tr><th>recipe</th>{head}<th></th></tr>{rows}</table>"
        f"</div><p class='soft'><small>{note}</small></p>"
    )


def _verdict_cell(build: RecipeResult) -> str:
    text = "passed" if build.report.passed else "did not pass"
    if build.name in PEERS:
        return f"<td class='soft'>comparison<small>{text}</small></td>"
    return f"<td class='{'ok' if build.report.passed else 'no'}'>{text}</td>"


def _pareto(comparison: RecipeComparison) -> str:
    points = [(b.name, b.nbytes / 1e6, b.latent) for b in comparison.builds]
    return f"<h2>Error against size</h2>{scatter('error of the latent', 'MB of weights', points)}"


def _scores(comparison: RecipeComparison) -> str:
    names = [name for name in NAMES if name in comparison.source.scores]
    head = "".join(f"<th class='n'>{NAMES[name]}</th>" for name in names)
    none: dict[str, tuple[float, float]] = {}
    same = [b for b in comparison.builds if all(change == (0.0, 0.0) for change in b.differences.values())]
    alike = ", ".join(escape(b.name) for b in same)
    line = f"<p>Right and wrong on the same prompts as the source: {alike}.</p>" if same else ""
    rows = "".join(
        f"<tr><td>{escape(label)}</td>"
        + "".join(f"<td class='n' data-is='{NAMES[n]}'>{_score(scored, n, changes)}</td>" for n in names)
        + "</tr>"
        for label, scored, changes in (
            ("source", comparison.source, none),
            *((b.name, b.scored, b.differences) for b in comparison.builds if b not in same),
        )
    )
    note = (
        "Share of prompts for which a detector finds everything right; below it the 95 % bootstrap interval of the"
        f" paired difference from the source, in points. With only {comparison.prompts} prompts, one is worth 4 to 25"
        " points: the distances above are the finer measure."
    )
    return (
        f"<h2>Scores</h2><div class='scroll'><table class='rows'><tr><th>model</th>{head}</tr>{rows}</table></div>"
        f"{line}"
        f"<p class='soft'><small>{note}</small></p>"
    )


def _score(scored: Scored, name: str, changes: Mapping[str, tuple[float, float]]) -> str:
    if name not in changes:
        return f"{scored.scores[name]:.0%}"
    low, high = changes[name]
    return f"{scored.scores[name]:.0%}<small>{100 * low:+.0f}..{100 * high:+.0f}</small>"


def _pictures(comparison: RecipeComparison) -> str:
    """A table of pictures: a column per prompt, a row for the source and for each build; wrong pictures are framed."""
    prompts = "".join(f"<th class='asked'>{escape(c.text)}</th>" for c in comparison.columns)
    before = "".join(f"<td>{_image(c.before, 'input') if c.before else ''}</td>" for c in comparison.columns)
    rows = "".join(
        f"<tr><td>{escape(label)}</td>"
        + "".join(f"<td>{_image(tile.png, 'right' if tile.right else 'wrong')}</td>" for tile in scored.tiles)
        + "</tr>"
        for label, scored in (("source", comparison.source), *((b.name, b.scored) for b in comparison.builds))
    )
    return (
        f"<h2>Pictures</h2><div class='scroll'><table class='sheet'><tr><th></th>{prompts}</tr>"
        f"<tr><td>input</td>{before}</tr>{rows}</table></div>"
        "<p class='soft'><small>All pictures of a column start from the same noise. Framed: something differs from the"
        " prompt. The last pictures follow a plan that the model wrote first.</small></p>"
    )


def _image(png: bytes, what: str) -> str:
    return f"<img class='{what}' alt='{what}' title='{what}' width='64' src='data:image/png;base64,{_base64(png)}'>"


def _link(page: Path, folder: Path) -> str:
    return Path(os.path.relpath(page, folder)).as_posix()


def _percents(scored: Scored, names: Sequence[str]) -> str:
    return "".join(f"{scored.scores[n]:>7.0%}" for n in names)


def _decibel(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f}"


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode("ascii")
