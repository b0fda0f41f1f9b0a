"""GenEval's rules (Ghosh et al. 2023, `evaluate_images.py`): is in the picture what the prompt names?

The official scorer uses Mask2Former (Swin-S, COCO) for things and CLIP ViT-L/14 for colours; here both are models that
the user has, opened by transformers (`detectors.py`), so figures are comparable to published ones only with those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagel_compress.evaluate.items import Item
from bagel_compress.evaluate.runner import picture_of
from bagel_compress.evaluate.values import Total, Values

THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, POSITION_THRESHOLD = 0.3, 0.9, 16, 0.1  # of the official script
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """What a detector saw: box (x0, y0, x1, y1) in pixels, confidence, and a mask [H, W] if it gives one."""

    name: str
    box: tuple[float, float, float, float]
    confidence: float
    mask: np.ndarray | None = None


Detector = Callable[[Image.Image], Sequence[Detection]]
Colors = Callable[[Image.Image, Sequence[Detection]], Sequence[str]]  # the colour of each thing


def score_geneval(items: Sequence[Item], out: Path, detector: Detector, colors: Colors) -> Values:
    """Percent of pictures that show what was asked for, by tag, and `overall`, the average of the tags."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        with Image.open(picture_of(out, item)) as opened:
            image = opened.convert("RGB")
        right = not faults(image, detector(image), item.wanted, colors)
        values[item.category][item.cluster].append(100.0 * right)
    return Values(values, {"overall": Total(tuple(values))})


def faults(image: Image.Image, things: Sequence[Detection], asked: Mapping[str, Any], colors: Colors) -> list[str]:
    """What is wrong with a picture, a phrase each; nothing if it is right.

    `asked`: `include` is a list of class, count and maybe color and position (relation, number of the entry that it is
    relative to), `exclude` of class and count. Colours and places are those of the most confident things.
    """
    seen = _by_class(things, COUNTING_THRESHOLD if asked.get("tag") == "counting" else THRESHOLD)
    found: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for wanted in asked.get("include", ()):
        name, count = wanted["class"], wanted["count"]
        group = seen.get(name, [])[:count]
        fault = f"{len(group)} {name} instead of {count}" if len(group) < count else ""
        if not fault and "color" in wanted:
            fault = _color_fault(image, group, wanted, colors)
        if not fault and "position" in wanted:
            fault = _position_fault(group, wanted, matched)
        matched.append(None if fault else group)
        found += [fault] if fault else []
    for unwanted in asked.get("exclude", ()):
        if len(seen.get(unwanted["class"], [])) >= unwanted["count"]:
            found.append(f"{len(seen[unwanted['class']])} {unwanted['class']}, less than {unwanted['count']} wanted")
    return found


def relations(a: Detection, b: Detection) -> set[str]:
    """Where a is from b, with boxes that have to be apart by a tenth of their sizes."""
    box_a, box_b = np.array(a.box).reshape(2, 2), np.array(b.box).reshape(2, 2)
    offset = box_a.mean(0) - box_b.mean(0)
    sizes = np.abs(np.diff(box_a, axis=0))[0] + np.abs(np.diff(box_b, axis=0))[0]
    apart = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if np.all(np.abs(apart) < 1e-3):
        return set()
    dx, dy = apart / np.linalg.norm(offset)
    found = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in found.items() if holds}


def _by_class(things: Sequence[Detection], threshold: float) -> dict[str, list[Detection]]:
    seen: dict[str, list[Detection]] = defaultdict(list)
    for thing in sorted(things, key=lambda t: -t.confidence):
        if thing.confidence > threshold and len(seen[thing.name]) < MAX_OBJECTS:
            seen[thing.name].append(thing)
    return seen


def _color_fault(image: Image.Image, group: Sequence[Detection], wanted: Mapping[str, Any], colors: Colors) -> str:
    found = list(colors(image, group))
    if found.count(wanted["color"]) >= wanted["count"]:
        return ""
    return f"{', '.join(found)} {wanted['class']} instead of {wanted['color']}"


def _position_fault(
    group: Sequence[Detection], wanted: Mapping[str, Any], matched: Sequence[Sequence[Detection] | None]
) -> str:
    relation, target = wanted["position"]
    others = matched[target]
    if others is None:
        return f"nothing for {wanted['class']} to be {relation}"
    if all(relation in relations(thing, other) for thing in group for other in others):
        return ""
    return f"{wanted['class']} not {relation} the other"
