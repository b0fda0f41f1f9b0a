"""Charts the error of each format on BAGEL-nano against its bits per weight, from figures that come with the package.

`benchmarks/nano_formats.py` measures the figures. ecq can have any rate, so its points are joined to a curve; the other
formats have fixed rates, and are single points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Literal

from bagel_compress.errors import InputError
from bagel_compress.io.packaged import resource
from bagel_compress.io.yaml_model import FrozenModel, load_yaml

FIGURES = resource("BAGEL-nano").parent / "nano_formats.json"
CURVE = "ecq"
FAMILIES = (CURVE, "nf4", "int4", "nvfp4", "mxfp", "int8", "fp8")  # in the order of the page's colours
WIDTH, HEIGHT = 680, 380
LEFT, RIGHT, TOP, BOTTOM = 52, 104, 14, 40
Y_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
TITLE = "BAGEL-nano: error of the picture against bits per weight of the experts"
COLOURS = ("#2f6fde", "#d9730d", "#7c4dce", "#188a6b", "#c0392b", "#7a7f87", "#b8a13a")  # of a standalone file


class FormatFigure(FrozenModel):
    """The figures of one format at one rate."""

    label: str
    rounding: Literal["nearest", "gptq"]
    bits: float  # stored per weight of the experts' linears, at the released model's shapes
    latent: float  # |error of the final latent| / |latent - noise|, mean over pictures
    ratio: float  # of that mean to the one of NF4 with rounding to nearest
    low: float  # bounds of the 95 % interval of the ratio, over prompts
    high: float
    equal_texts: float  # share of texts that equal the reference's

    @property
    def family(self) -> str:
        return next(name for name in FAMILIES if self.label.startswith(name))


class Figures(FrozenModel):
    """The figures of all formats, measured on the same prompts."""

    seed: int
    pictures: int
    texts: int
    formats: tuple[FormatFigure, ...]

    @classmethod
    def load(cls, path: Path = FIGURES) -> Figures:
        """The figures in a file (JSON is YAML). Raises InputError."""
        return load_yaml(cls, path, "figures", InputError)


def chart(figures: Figures) -> str:
    """The chart as an SVG element, in the page's colours --c0 to --c6."""
    rates = [f.bits for f in figures.formats]
    errors = [f.latent for f in figures.formats]
    x0, x1 = math.floor(min(rates) * 2) / 2, math.ceil(max(rates) * 2) / 2
    y0, y1 = (math.log10(bound) for bound in (min(errors) / 1.2, max(errors) * 1.2))

    def place(bits: float, error: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (bits - x0) / (x1 - x0)
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(error) - y0) / (y1 - y0)

    body = []
    for tick in (t for t in Y_TICKS if y0 <= math.log10(t) <= y1):
        _, y = place(x0, tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3:.1f}" text-anchor="end">{tick:g}</text>')
    for bits in range(math.ceil(x0), math.floor(x1) + 1):
        x, _ = place(bits, 10**y0)
        body.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{bits}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    body.append(
        f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">bits per weight of the experts</text>'
    )
    curve = [place(f.bits, f.latent) for f in sorted(figures.formats, key=lambda f: f.bits) if f.label == CURVE]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in curve)
    body.append(f'<polyline points="{joined}" fill="none" style="stroke:var(--c0)"/>')
    body += [_dot(*place(f.bits, f.latent), f) for f in figures.formats]
    body += _legend()
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(TITLE)}">{"".join(body)}</svg>'


def chart_file(figures: Figures) -> str:
    """The chart as an SVG file with its own colours."""
    colours = "".join(f"--c{i}:{colour};" for i, colour in enumerate(COLOURS))
    style = (
        f"<style>svg{{{colours}background:#fff;font-family:system-ui,sans-serif}}polyline{{stroke-width:1.8}}"
        ".grid{stroke:#e2e2dd}text{font-size:11px;fill:#66696e}</style>"
    )
    opening, rest = chart(figures).split(">", 1)
    return opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) + f">{style}{rest}\n"


def section(figures: Figures) -> str:
    """The chart with its heading and note, for a page."""
    return (
        "<h2>Any number of bits</h2><figure class='chart pareto'>"
        f"<figcaption>{escape(TITLE)}</figcaption>{chart(figures)}</figure><p class='soft'><small>Mean error of the"
        f" final latent, relative to its distance from the noise, over {figures.pictures} pictures of prompts of their"
        " own. Only the experts are compressed. Hollow: each weight rounded alone; filled: calibrated rounding. The"
        " values come with the package (benchmarks/nano_formats.py measures them); this run did not measure"
        " them.</small></p>"
    )


def _dot(x: float, y: float, figure: FormatFigure) -> str:
    colour = f"var(--c{FAMILIES.index(figure.family)})"
    fill = colour if figure.rounding == "gptq" else "none"
    what = "calibrated" if figure.rounding == "gptq" else "each weight rounded alone"
    title = f"{figure.label}, {what}: {figure.bits:.2f} bits, error {figure.latent:.4f}"
    radius = 3 if figure.label == CURVE else 5
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" style="stroke:{colour};stroke-width:1.8;fill:{fill}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _legend() -> Sequence[str]:
    """The legend: families of formats by colour, kinds of rounding by fill."""
    x = WIDTH - RIGHT + 16
    entries = [(name, f"var(--c{i})", f"var(--c{i})") for i, name in enumerate(FAMILIES)]
    entries += [("nearest", "var(--c5)", "none"), ("calibrated", "var(--c5)", "var(--c5)")]
    made = []
    for i, (name, stroke, fill) in enumerate(entries):
        y = TOP + 10 + 18 * i + (12 if i >= len(FAMILIES) else 0)
        made.append(f'<circle cx="{x}" cy="{y}" r="5" style="stroke:{stroke};stroke-width:1.8;fill:{fill}"/>')
        made.append(f'<text class="tick" x="{x + 11}" y="{y + 4}">{name}</text>')
    return made
