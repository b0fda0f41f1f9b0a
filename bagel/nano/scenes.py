"""Scenes: one or two coloured shapes at named places on a plain background, drawn at 32 x 32 pixels.

The world is as small as it can be while every question about compression can still be asked of it: shape, colour,
place, count and background, each drawn independently. Sizes and jitter are chosen so that shapes never touch and a 4x
autoencoder can hold their outlines. No size words, no third object, no overlap: they cost training time, not insight.

Everything is deterministic in the generator that is passed in. Colours are sRGB bytes, lengths are pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

SIDE = 32
SHAPES = ("circle", "square", "triangle")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 230),
    "yellow": (245, 215, 45),
    "purple": (150, 50, 190),
    "orange": (245, 135, 25),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
    "pink": (250, 180, 205),
}
PLACES: dict[str, tuple[float, float]] = {  # centre (x, y)
    "left": (8.2, 16.0),
    "right": (23.8, 16.0),
    "top": (16.0, 8.2),
    "bottom": (16.0, 23.8),
    "center": (16.0, 16.0),
}
RADIUS = (5.0, 5.9)
COLOR_JITTER = 2.0  # standard deviation of the background's colour, bytes
ALONG, ACROSS = 0.7, 1.5  # largest shift of a centre, along and across the axis on which places lie

Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. The centre is that of its bounding box."""

    shape: str
    color: str
    place: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture before it is drawn. Of two things the first is the left or upper one; shapes and colours differ."""

    background: str
    tint: tuple[float, float, float]
    things: tuple[Thing, ...]


def sample_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A random scene with one or two things (even odds), every attribute uniform."""
    count = count or int(rng.integers(1, 3))
    if count == 1:
        places: tuple[str, ...] = (pick(rng, PLACES),)
    else:
        places = ("left", "right") if rng.random() < 0.5 else ("top", "bottom")
    shapes = rng.permutation(SHAPES)[:count]
    colors = rng.permutation(tuple(COLORS))[:count]
    things = tuple(
        _placed(rng, str(s), str(c), p, float(rng.uniform(*RADIUS)))
        for s, c, p in zip(shapes, colors, places, strict=True)
    )
    background = pick(rng, BACKGROUNDS)
    return Scene(background, _tint(rng), things)


def pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    """One of the options, uniformly."""
    choices = tuple(options)
    return choices[int(rng.integers(len(choices)))]


def moved(rng: np.random.Generator, thing: Thing, place: str) -> Thing:
    """The same thing at another place, size kept."""
    return _placed(rng, thing.shape, thing.color, place, thing.radius)


def recoloured(thing: Thing, color: str) -> Thing:
    """The same thing in another colour."""
    return replace(thing, color=color)


def render(scene: Scene, colors: Mapping[str, tuple[int, int, int]] = COLORS) -> Image:
    """The picture: uint8 [SIDE, SIDE, 3], edges anti-aliased over one pixel. `colors`: of things, by name."""
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = np.clip(np.add(BACKGROUNDS[scene.background], scene.tint), 0, 255)
    for thing in scene.things:
        alpha = coverage(thing.shape, thing.x, thing.y, thing.radius)[..., None]
        canvas += alpha * (np.asarray(colors[thing.color], np.float32) - canvas)
    return np.rint(canvas).astype(np.uint8)


def coverage(shape: str, x: float, y: float, radius: float) -> NDArray[np.float32]:
    """Share of every pixel that the shape covers (approximately: a ramp of one pixel over the signed distance)."""
    dx, dy = _GRID_X - np.float32(x), _GRID_Y - np.float32(y)
    return np.clip(0.5 - _signed_distance(shape, dx, dy, radius), 0, 1).astype(np.float32)


# Widths that make the three shapes look equally large: half side of the square, circumradius of the triangle.
_SQUARE, _TRIANGLE = 0.90, 1.25
_GRID_Y, _GRID_X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def _signed_distance(
    shape: str, dx: NDArray[np.float32], dy: NDArray[np.float32], radius: float
) -> NDArray[np.float32]:
    if shape == "circle":
        return np.hypot(dx, dy) - np.float32(radius)
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - np.float32(_SQUARE * radius)
    r = _TRIANGLE * radius  # upright and equilateral: top at -r, base at +r/2 around the centroid
    from_centroid = dy - 0.25 * r  # so that the bounding box, 1.5 r high, is centred
    slanted = (np.sqrt(3.0) * np.abs(dx) - from_centroid) / 2 - r / 2
    return np.maximum(slanted, from_centroid - r / 2).astype(np.float32)


def _placed(rng: np.random.Generator, shape: str, color: str, place: str, radius: float) -> Thing:
    shift = rng.uniform(-1, 1, 2) * ((ALONG, ACROSS) if place in ("left", "right") else (ACROSS, ALONG))
    x, y = PLACES[place]
    return Thing(shape, color, place, float(x + shift[0]), float(y + shift[1]), radius)


def _tint(rng: np.random.Generator) -> tuple[float, float, float]:
    r, g, b = rng.normal(0, COLOR_JITTER, 3)
    return float(r), float(g), float(b)
