"""Small inline SVG charts: lines, bars, points. Colours are CSS variables, which the page sets for light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 12, 30
LETTER, LABEL_HEIGHT = 6.0, 11.0  # of a label at a point, in units of the drawing: about a letter's width; a line
COLOURS = 7  # --c0 .. --c6 in the page's style
Points = Sequence[tuple[float, float]]


def line_chart(
    title: str,
    x_label: str,
    lines: Mapping[str, Points],
    marks: Mapping[str, float] | None = None,
    reverse: bool = False,
    scale: Sequence[float] = (),
) -> str:
    """A line chart with a logarithmic y axis.

    `marks` are labelled horizontal lines; `reverse` runs x from high to low; `scale` are further values that the y axis
    has to include, so that charts can be compared. Zeros are drawn at the bottom of the axis. An empty line is not
    drawn, but the next line does not take its colour. If all values are zero, a sentence replaces the chart.
    """
    marks = {name: value for name, value in (marks or {}).items() if 0 < value < math.inf}
    points = [p for line in lines.values() for p in line if math.isfinite(p[1])]
    if not points:
        return ""
    if not any(y > 0 for _, y in points):
        caption = f"<figcaption>{escape(title)}</figcaption>"
        return f'<figure class="chart">{caption}<p class="equal">equal everywhere</p></figure>'
    low, high = _decades([*(y for _, y in points if y > 0), *marks.values(), *scale])
    xs = [x for x, _ in points]
    place = _Place(min(xs), max(xs), low, high, reverse)
    body = [_grid(place, low, high), _x_ticks(place, sorted(set(xs)), x_label)]
    for name, value in marks.items():
        y = place.y(value)
        body.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{y - 3:.1f}" text-anchor="end">{escape(name)}</text>')
    for index, line in enumerate(lines.values()):
        body.append(_line(place, line, index))
    legend = "".join(
        f'<span><i style="background:var(--c{i % COLOURS})"></i>{escape(name)}</span>'
        for i, (name, line) in enumerate(lines.items())
        if line
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def bars(rows: Sequence[tuple[str, float | None, str]], scale: float | None = None) -> str:
    """Horizontal bars from rows (label, value, text after the bar). A row with value None has no bar."""
    top = scale or max((v for _, v, _ in rows if v is not None and math.isfinite(v)), default=0.0)
    cells = []
    for label, value, text in rows:
        share = 0.0 if not top or value is None else min(1.0, value / top)
        cells.append(
            f'<div class="label">{escape(label)}</div><div class="bar"><i style="width:{share:.1%}"></i></div>'
            f'<div class="num">{escape(text)}</div>'
        )
    return f'<div class="bars">{"".join(cells)}</div>'


def stacked(parts: Sequence[tuple[str, float]], scale: float, limit: float | None) -> str:
    """One bar of named parts, drawn against `scale`, with a mark at `limit`."""
    scale = scale or 1.0
    segments = "".join(
        f'<i title="{escape(name)}" style="width:{value / scale:.2%};background:var(--c{i % COLOURS})"></i>'
        for i, (name, value) in enumerate(parts)
    )
    mark = "" if limit is None else f'<b style="left:{min(1.0, limit / scale):.2%}"></b>'
    return f'<div class="stack">{segments}{mark}</div>'


class _Place:
    """Maps values to pixels: x linear, y logarithmic."""

    def __init__(self, x0: float, x1: float, low: float, high: float, reverse: bool) -> None:
        self._x = (x1, x0) if reverse else (x0, x1)
        self._y = (math.log10(low), math.log10(high))

    def x(self, value: float) -> float:
        start, stop = self._x
        return LEFT + (WIDTH - LEFT - RIGHT) * (0.5 if start == stop else (value - start) / (stop - start))

    def y(self, value: float) -> float:
        low, high = self._y
        share = 0.0 if value <= 0 else (math.log10(value) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * max(0.0, min(1.0, share))


def scatter(title: str, x_label: str, points: Sequence[tuple[str, float, float]]) -> str:
    """A chart of named points (name, x, y) with a logarithmic y axis; zeros are drawn on the lowest grid line.

    Points of the Pareto front (no other has both smaller x and smaller y) are coloured.
    """
    ys = [y for _, _, y in points if y > 0]
    low, high = _decades(ys or [1.0])
    low /= 10 if len(ys) < len(points) else 1
    xs = [x for _, x, _ in points]
    margin = (max(xs) - min(xs)) * 0.12 or 1.0
    place = _Place(min(xs) - margin, max(xs) + margin, low, high, reverse=False)
    spots = {name: (place.x(x), place.y(max(y, low))) for name, x, y in points}
    front = [n for n, x, y in sorted(points, key=lambda p: p[1]) if not any(_beats(q, (n, x, y)) for q in points)]
    body = [
        _grid(place, low, high, zero=len(ys) < len(points)),
        _x_ticks(place, _apart(place, sorted(set(xs))), x_label),
    ]
    for (name, (x, y)), (left, top) in zip(spots.items(), _label_places(spots), strict=True):
        colour = "var(--c0)" if name in front else "var(--c5)"
        end = _nearest((left, top, LETTER * len(name), LABEL_HEIGHT), x, y)
        if math.dist(end, (x, y)) > LABEL_HEIGHT:
            body.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>')
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:{colour}"/>')
        body.append(f'<text x="{left:.1f}" y="{top + LABEL_HEIGHT - 2:.1f}">{escape(name)}</text>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    return f'<figure class="chart pareto"><figcaption>{escape(title)}</figcaption>{svg}</figure>'


def _label_places(spots: Mapping[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """Left and upper edge of each point's label: the place nearest to its point where it covers least.

    One after the other: inside the drawing, off the points, off the labels before it.
    """
    points = [(x - 4, y - 4, 8.0, 8.0) for x, y in spots.values()]
    taken: list[tuple[float, float, float, float]] = []
    for name, (x, y) in spots.items():
        width = LETTER * len(name)
        places = [
            (left, y + down, width, LABEL_HEIGHT)
            for down in (-LABEL_HEIGHT - 2, 2, -LABEL_HEIGHT / 2, *(s * d for d in range(14, 150, 4) for s in (-1, 1)))
            for left in (x + 6, x - 6 - width, x - width / 2, x + 40, x - 40 - width)
        ]
        inside = [p for p in places if p[0] >= LEFT - 8 and p[0] + width <= WIDTH and 0 <= p[1] <= HEIGHT - BOTTOM - 8]
        covered = {place: sum(_shared(place, other) for other in points + taken) for place in inside or places}
        taken.append(min(covered, key=lambda place: (covered[place], math.dist(_nearest(place, x, y), (x, y)))))
    return [(left, top) for left, top, _, _ in taken]


def _nearest(box: tuple[float, float, float, float], x: float, y: float) -> tuple[float, float]:
    """The point of a box (left, top, width, height) that lies nearest to a point."""
    left, top, width, height = box
    return min(max(x, left), left + width), min(max(y, top), top + height)


def _shared(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area that two boxes (left, top, width, height) share."""
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0.0, across) * max(0.0, down)


def standalone(figure: str) -> str:
    """The SVG of a figure as a file of its own, with fixed colours in place of the page's."""
    drawing = figure[figure.index("<svg ") : figure.index("</svg>") + len("</svg>")]
    style = (
        "svg{--c0:#2563eb;--c5:#9ca3af;background:#fff;font:9px sans-serif}"
        ".grid{stroke:#e5e7eb}.tick{fill:#6b7280;font-size:8px}"
    )
    tag, _, content = drawing.partition(">")
    return f'{tag} xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}"><style>{style}</style>{content}'


def _apart(place: _Place, xs: Sequence[float]) -> list[float]:
    """The values whose tick labels do not overlap."""
    kept: list[float] = []
    for x in xs:
        if not kept or place.x(x) - place.x(kept[-1]) > 26:
            kept.append(x)
    return kept


def _beats(a: tuple[str, float, float], b: tuple[str, float, float]) -> bool:
    return a[1] <= b[1] and a[2] <= b[2] and (a[1] < b[1] or a[2] < b[2])


def _decades(values: Sequence[float]) -> tuple[float, float]:
    low = 10.0 ** math.floor(math.log10(min(values)))
    high = 10.0 ** math.ceil(math.log10(max(values)))
    return (low / 10 if low == high else low), high


def _grid(place: _Place, low: float, high: float, zero: bool = False) -> str:
    """A horizontal line per decade. With `zero`, the lowest one is labelled 0."""
    exponents = range(round(math.log10(low)), round(math.log10(high)) + 1)
    step = max(1, len(exponents) // 5)
    drawn = []
    for exponent in exponents:
        y = place.y(10.0**exponent)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if (exponent - exponents[0]) % step == 0:
            label = "0" if zero and exponent == exponents[0] else f"{10.0**exponent:g}"
            drawn.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{label}</text>')
    return "".join(drawn)


def _x_ticks(place: _Place, xs: Sequence[float], label: str) -> str:
    step = max(1, math.ceil(len(xs) / 6))
    ticks = "".join(
        f'<text class="tick" x="{place.x(x):.1f}" y="{HEIGHT - BOTTOM + 12}" text-anchor="middle">{x:.3g}</text>'
        for x in xs[::step]
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return ticks + f'<text class="tick" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>'


def _line(place: _Place, line: Points, index: int) -> str:
    kept = [(place.x(x), place.y(y)) for x, y in line if math.isfinite(y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in kept)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in kept)
    colour = f"var(--c{index % COLOURS})"
    return f'<g style="stroke:{colour};fill:{colour}"><polyline points="{path}" fill="none"/>{dots}</g>'
