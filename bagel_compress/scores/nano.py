"""The benchmark of BAGEL-nano: drawing, answering, editing and planning.

Categories are like GenEval's. `draw.one` and `draw.two` count pictures of one and two things in which everything is
right; `draw.shape`, `draw.color`, `draw.place`, `draw.count` and `draw.background` count single properties. `ask` and
`edit` have a category per kind (`ask.KIND`) beside the total. `think.plan` counts plans that name what the prompt asks
for, `think` those whose picture also equals the plan. Pictures are read by the detector of `bagel.nano`, which makes no
error on clean renders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bagel.nano import language
from bagel.nano.detector import DetectedScene, read
from bagel.nano.scenes import SIDE, Scene, render, sample_scene
from bagel.settings import FlowSettings, TextSettings
from bagel_compress.scores.benchmark import Answer, Benchmark, Prompt

DRAW_FLOW = FlowSettings(
    num_timesteps=12, timestep_shift=2.0, cfg_text_scale=3.0, cfg_interval=(0.0, 1.0), cfg_renorm_min=1.0
)
EDIT_FLOW = FlowSettings(
    num_timesteps=12, timestep_shift=2.0, cfg_text_scale=3.0, cfg_img_scale=1.3, cfg_interval=(0.0, 1.0),
    cfg_renorm_type="text_channel",
)  # fmt: skip
SEED = 20_000  # no seed of training comes near it

ExpectedThing = tuple[str, str, str]  # shape, colour, place


@dataclass(frozen=True, slots=True)
class Shown:
    """The contents of a picture: its background and its things."""

    background: str
    things: tuple[ExpectedThing, ...]

    @classmethod
    def of(cls, scene: Scene) -> Shown:
        return cls(scene.background, tuple(sorted((t.shape, t.color, t.place) for t in scene.things)))

    @classmethod
    def seen(cls, reading: DetectedScene) -> Shown:
        return cls(reading.background, tuple(sorted((t.shape, t.color, t.place) for t in reading.things)))


def nano_benchmark(draw: int = 240, ask: int = 168, edit: int = 100, think: int = 60, seed: int = SEED) -> Benchmark:
    """The benchmark with this many prompts per task: half of `draw` with one thing, half with two; kinds of questions
    and edits in turn."""
    rng = np.random.default_rng(seed)
    prompts = (
        *(_draw(rng, 1 + i % 2) for i in range(draw)),
        *(_ask(rng, language.QUESTIONS[i % len(language.QUESTIONS)]) for i in range(ask)),
        *(_edit(rng, language.EDITS[i % len(language.EDITS)]) for i in range(edit)),
        *(_think(rng) for _ in range(think)),
    )
    flows = {"": DRAW_FLOW, "edit": EDIT_FLOW}
    return Benchmark("nano", prompts, score, flows, TextSettings(max_tokens=40), seed)


def score(prompt: Prompt, answer: Answer) -> Mapping[str, float]:
    """The values of one answer, by category."""
    task, _, kind = prompt.kind.partition(".")
    if task == "ask":
        right = float((answer.text or "").strip() == prompt.wanted)
        return {"ask": right, prompt.kind: right}
    assert answer.image is not None
    found = Shown.seen(read(np.asarray(answer.image)))
    if task == "draw":
        return {kind: float(found == prompt.wanted), **_parts(prompt.wanted, found)}
    if task == "edit":
        right = float(found == prompt.wanted)
        return {"edit": right, prompt.kind: right}
    return _score_plan(prompt, answer, found)


def _score_plan(prompt: Prompt, answer: Answer, found: Shown) -> Mapping[str, float]:
    plan = language.parse_thoughts(answer.text or "")
    if plan is None:
        return {"think": 0.0, "think.plan": 0.0}
    planned = Shown(plan.background, tuple(sorted(plan.things)))
    asked = float(sorted((s, c) for s, c, _ in plan.things) == prompt.wanted)
    return {"think": asked * float(found == planned), "think.plan": asked}


def _parts(wanted: Shown, found: Shown) -> dict[str, float]:
    """Which single properties of a picture are right (1.0) or wrong (0.0), by category."""
    columns = {"shape": 0, "color": 1, "place": 2}
    return {
        **{
            f"draw.{name}": float(sorted(t[i] for t in wanted.things) == sorted(t[i] for t in found.things))
            for name, i in columns.items()
        },
        "draw.count": float(len(wanted.things) == len(found.things)),
        "draw.background": float(wanted.background == found.background),
    }


def _picture(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene))


def _draw(rng: np.random.Generator, count: int) -> Prompt:
    scene = sample_scene(rng, count)
    kind = "draw.one" if count == 1 else "draw.two"
    return Prompt(kind, (language.caption(scene, rng),), size=(SIDE, SIDE), wanted=Shown.of(scene))


def _ask(rng: np.random.Generator, kind: str) -> Prompt:
    scene = sample_scene(rng, 2 if kind == "relation" else None)
    question = language.question(scene, kind, rng)
    return Prompt(f"ask.{kind}", (_picture(scene), question.text), output="text", wanted=question.answer)


def _edit(rng: np.random.Generator, kind: str) -> Prompt:
    edit = language.sample_edit(rng, kind)
    return Prompt(f"edit.{kind}", (_picture(edit.before), edit.text), wanted=Shown.of(edit.after), guidance="edit")


def _think(rng: np.random.Generator) -> Prompt:
    plan = language.sample_plan(rng)
    names = sorted((t.shape, t.color) for t in plan.scene.things)
    return Prompt("think", (plan.prompt,), think=True, size=(SIDE, SIDE), wanted=names)
