"""The language of the nano world: captions, questions and answers, edits, and think plans.

Every kind of question is balanced: what is right is drawn first or drawn uniformly, so that no constant answer beats
`CHANCE` by more than luck. Sentences are few and plain; every word is one token of the nano tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from bagel.nano.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, Scene, Thing, moved, pick, recoloured, sample_scene

NUMBERS = {1: "one", 2: "two"}
DESCRIBE = "describe the picture."
CHANCE = {  # share of right answers of the best constant answer, by kind of question
    "color": 1 / 6, "shape": 1 / 3, "background": 1 / 4, "count": 1 / 2, "yesno": 1 / 2, "where": 1 / 4,
    "relation": 1 / 18,
}  # fmt: skip
QUESTIONS = tuple(CHANCE)
EDITS = ("recolor", "background", "remove", "move")
_SIDE_WORDS = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom",
               "center": "in the center"}  # fmt: skip
_BESIDE = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene with its only right answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Edit:
    """An instruction that turns one scene into another."""

    kind: str
    before: Scene
    text: str
    after: Scene


@dataclass(frozen=True, slots=True)
class ThinkTask:
    """A prompt that leaves things open, the think text that decides them, and the scene that follows the plan."""

    prompt: str
    thoughts: str
    scene: Scene


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """What a scene shows, nothing left open: `a red circle left of a blue square on a white background`.

    With a generator two things are named in either order; without one, the left or upper one comes first.
    """
    ground = f"on a {scene.background} background"
    if len(scene.things) == 1:
        thing = scene.things[0]
        return f"{one(thing.name)} {_SIDE_WORDS[thing.place]} {ground}"
    a, b = scene.things
    if rng is not None and rng.random() < 0.5:
        a, b = b, a
    return f"{one(a.name)} {_BESIDE[a.place]} {one(b.name)} {ground}"


def one(name: str) -> str:
    """With the article: `a red circle`, `an orange circle`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def question(scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    """A question of a kind. Raises ValueError for `relation` on a scene with one thing."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if kind == "color":
        return Question(kind, f"what color is the {thing.shape}?", thing.color)
    if kind == "shape":
        return Question(kind, f"what shape is the {thing.color} object?", thing.shape)
    if kind == "background":
        return Question(kind, "what color is the background?", scene.background)
    if kind == "count":
        return Question(kind, "how many objects are there?", NUMBERS[len(scene.things)])
    if kind == "where":
        return Question(kind, f"where is the {thing.name}?", thing.place)
    if kind == "yesno":
        return _yes_no(scene, thing, rng)
    if kind == "relation" and len(scene.things) == 2:
        other = scene.things[1] if thing is scene.things[0] else scene.things[0]
        return Question(kind, f"what is {_BESIDE[other.place]} the {thing.shape}?", other.name)
    raise ValueError(f"no question of kind {kind!r} about {len(scene.things)} things")


def kinds_for(scene: Scene) -> tuple[str, ...]:
    """Kinds of questions that a scene can answer."""
    return QUESTIONS if len(scene.things) == 2 else QUESTIONS[:-1]


def sample_edit(rng: np.random.Generator, kind: str, count: int | None = None) -> Edit:
    """A scene, an instruction of this kind and its result. The tint of an unchanged background is kept.

    `count`: of things, where the kind leaves it open (two can be removed from, one can be moved).
    """
    scene = sample_scene(rng, {"remove": 2, "move": 1}.get(kind, count))
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    if kind == "recolor":
        color = pick(rng, set_minus(COLORS, {t.color for t in scene.things}))
        things = tuple(recoloured(t, color) if i == index else t for i, t in enumerate(scene.things))
        return Edit(kind, scene, f"make the {thing.shape} {color}", replace(scene, things=things))
    if kind == "background":
        ground = pick(rng, set_minus(BACKGROUNDS, {scene.background}))
        return Edit(kind, scene, f"make the background {ground}", replace(scene, background=ground))
    if kind == "remove":
        return Edit(kind, scene, f"remove the {thing.shape}", replace(scene, things=(scene.things[1 - index],)))
    place = pick(rng, set_minus(PLACES, {thing.place}))
    after = replace(scene, things=(moved(rng, thing, place),))
    return Edit(kind, scene, f"move the {thing.shape} to the {place}", after)


def sample_plan(rng: np.random.Generator) -> ThinkTask:
    """A prompt that names the things only; places and background are for the plan to choose."""
    scene = sample_scene(rng)
    order = rng.permutation(len(scene.things))
    names = [one(scene.things[int(i)].name) for i in order]
    return ThinkTask(" and ".join(names), thoughts(scene), scene)


def thoughts(scene: Scene) -> str:
    """`<think> background white; red circle left; blue square right </think>`."""
    parts = [f"background {scene.background}", *(f"{t.name} {t.place}" for t in scene.things)]
    return f"<think> {'; '.join(parts)} </think>"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a think text asks for: the background and (shape, colour, place) of each thing."""

    background: str
    things: tuple[tuple[str, str, str], ...]


def parse_thoughts(text: str) -> Wanted | None:
    """The plan in a think text, or None if it is not well formed."""
    words = text.strip().removeprefix("<think>").removesuffix("</think>")
    if words.strip() == text.strip():
        return None
    ground, *things = [part.split() for part in words.split(";")]
    if len(ground) != 2 or ground[0] != "background" or ground[1] not in BACKGROUNDS or not 1 <= len(things) <= 2:
        return None
    if any(len(t) != 3 or t[0] not in COLORS or t[1] not in SHAPES or t[2] not in PLACES for t in things):
        return None
    return Wanted(ground[1], tuple((shape, color, place) for color, shape, place in things))


def set_minus(options: Iterable[str], out: set[str]) -> list[str]:
    """Options without some, in their order."""
    return [o for o in options if o not in out]


def _yes_no(scene: Scene, thing: Thing, rng: np.random.Generator) -> Question:
    """Half yes; a no differs from a thing that is there in colour or in shape."""
    if rng.random() < 0.5:
        return Question("yesno", f"is there {one(thing.name)}?", "yes")
    if rng.random() < 0.5:
        wrong = f"{pick(rng, set_minus(COLORS, {thing.color}))} {thing.shape}"
    else:
        wrong = f"{thing.color} {pick(rng, set_minus(SHAPES, {thing.shape}))}"
    return Question("yesno", f"is there {one(wrong)}?", "no")


def vocabulary() -> list[str]:
    """Sentences in which every word of the language occurs, for the tokenizer."""
    rng = np.random.default_rng(0)
    lines = [DESCRIBE, *NUMBERS.values(), "yes", "no", *COLORS, *SHAPES, *BACKGROUNDS, *PLACES]
    for _ in range(500):
        scene = sample_scene(rng)
        lines += [caption(scene, rng)]
        lines += [f"{q.text} {q.answer}" for q in (question(scene, k, rng) for k in kinds_for(scene))]
        lines += [sample_edit(rng, kind).text for kind in EDITS]
        plan = sample_plan(rng)
        lines += [plan.prompt, plan.thoughts]
    return lines
