"""The detector: reads a picture of the nano world back, to score what a model drew.

Pixels take the nearest colour of the palette, a 3 x 3 majority removes the mixed colours of anti-aliased edges, the
border tells the background, and connected areas of one colour are the things. Their shape is the one whose drawing at
the same place and area overlaps best. It is strict: a picture is read as what it shows, and a blob is no shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bagel.nano.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIDE, Image, coverage

MIN_PIXELS = 12  # an area smaller than this is a speck; the smallest drawn shape has over 50
MIN_OVERLAP = 0.75  # soft intersection over union below which a thing has no shape

# Area / radius^2 and centroid height below the bounding box' centre / radius, by shape (see scenes.py for the widths).
_AREA = {"circle": np.pi, "square": 4 * 0.90**2, "triangle": 0.75 * np.sqrt(3.0) * 1.25**2}
_DROP = {"circle": 0.0, "square": 0.0, "triangle": 0.25 * 1.25}


@dataclass(frozen=True, slots=True)
class DetectedThing:
    """A thing that was seen. `shape` is "?" if no shape fits."""

    shape: str
    color: str
    place: str
    x: float
    y: float
    overlap: float


@dataclass(frozen=True, slots=True)
class DetectedScene:
    """What a picture shows; things from left to right, or from top to bottom."""

    background: str
    things: tuple[DetectedThing, ...]


def read(image: Image, colors: Mapping[str, tuple[int, int, int]] = COLORS) -> DetectedScene:
    """Reads a uint8 [SIDE, SIDE, 3] picture. `colors`: those that a thing may have, by name."""
    names = (*BACKGROUNDS, *colors)
    palette = np.asarray([*BACKGROUNDS.values(), *colors.values()], np.float32)
    pixels = image.astype(np.float32)
    labels = _majority(np.square(pixels[:, :, None] - palette).sum(-1).argmin(-1), len(names))
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    background = int(np.bincount(border, minlength=len(names)).argmax())
    ground = np.median(pixels[labels == background], axis=0) if (labels == background).any() else palette[background]
    areas = [
        (label, area)
        for label in sorted(set(labels.ravel().tolist()) - {background})
        for area in _areas(labels == label)
    ]
    taken = np.logical_or.reduce([area for _, area in areas]) if areas else np.zeros(labels.shape, bool)
    things = [_read_thing(pixels, area, taken & ~area, names[label], ground) for label, area in areas]
    return DetectedScene(names[background], tuple(sorted(things, key=lambda t: (round(t.x / 8), t.y))))


def _majority(labels: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """Of `count` labels the most frequent label of every 3 x 3 neighbourhood (the lowest on ties)."""
    one_hot = np.pad(np.eye(count, dtype=np.int8)[labels], ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = one_hot[:-2] + one_hot[1:-1] + one_hot[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]).argmax(-1)


def _areas(left: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Connected areas of a mask (which is used up) that have a core: specks and mixed-colour rims are dropped."""
    areas = []
    while left.any():
        area = _flood(left)
        left &= ~area
        if area.sum() >= MIN_PIXELS and _cores(area):
            areas.append(area)
    return areas


def _cores(mask: NDArray[np.bool_]) -> bool:
    """Whether a 3 x 3 block fits into the mask."""
    rows = mask[:-2] & mask[1:-1] & mask[2:]
    return bool((rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]).any())


def _flood(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The 4-connected area of the first pixel of the mask."""
    area = np.zeros_like(mask)
    area.flat[int(mask.argmax())] = True
    while True:
        grown = _dilated(area) & mask
        if grown.sum() == area.sum():
            return area
        area = grown


def _dilated(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _read_thing(
    pixels: NDArray[np.float32],
    area: NDArray[np.bool_],
    other: NDArray[np.bool_],
    color_name: str,
    ground: NDArray[np.float32],
) -> DetectedThing:
    """Shape and place from the soft cover: how far each pixel lies between the background's and the thing's colour."""
    color = np.median(pixels[area], axis=0)
    towards = color - ground
    near = _dilated(_dilated(area)) & ~(_dilated(other) & ~area)
    along = (pixels - ground) @ towards / max(float(towards @ towards), 1.0)
    cover = (np.clip(along, 0, 1) * near).astype(np.float32)
    mass = float(cover.sum())
    if mass <= 0:
        return DetectedThing("?", color_name, "center", SIDE / 2, SIDE / 2, 0.0)
    steps = np.arange(SIDE, dtype=np.float32) + 0.5
    x, y = float(cover.sum(0) @ steps / mass), float(cover.sum(1) @ steps / mass)
    overlap, shape, middle = max(_fit(cover, shape, x, y, mass) for shape in SHAPES)
    place = min(PLACES, key=lambda p: (PLACES[p][0] - x) ** 2 + (PLACES[p][1] - middle) ** 2)
    return DetectedThing(shape if overlap >= MIN_OVERLAP else "?", color_name, place, x, middle, overlap)


def _fit(cover: NDArray[np.float32], shape: str, x: float, y: float, mass: float) -> tuple[float, str, float]:
    radius = float(np.sqrt(mass / _AREA[shape]))
    middle = y - _DROP[shape] * radius
    drawn = coverage(shape, x, middle, radius)
    return float(np.minimum(cover, drawn).sum() / np.maximum(cover, drawn).sum()), shape, middle
