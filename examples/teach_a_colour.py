"""Teach a compressed model a new word: LoRA over an NF4 base, merged, compressed again and validated.

    python examples/teach_a_colour.py [OUT]

BAGEL-nano knows six colours of things. It gets 200 pictures of a seventh, "violet", with captions, in a plain folder. A
LoRA is trained over its NF4 build, as one would train over BAGEL-7B-MoT on a 24 GB GPU; pictures of the old world are
mixed in, so that it is not forgotten. The adapter is in PEFT's format; it is merged into the full-precision model while
that is compressed, to NF4 again and to INT8; the published one is validated against a trace of the merged model. Then
the detector looks for violet in fresh drawings of both, and the nano benchmark says what was forgotten.

The VAE is the limit of what can be taught: it was trained on six colours and shows most others as one of those. So
`PAINTED` was searched for: the VAE shows it as `SHOWN`, between blue and purple. Pictures that the VAE itself does not
carry are no lesson and are left out. Everything is computed in fp32, which any CPU does fast. A quarter of an hour
on one core.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import bagel_compress as bc
from bagel.inputs import to_tensor
from bagel.loops import Request
from bagel.nano import detector, language
from bagel.nano.scenes import COLORS, SIDE, Scene, coverage, render, sample_scene
from bagel_compress.finetune.config import FinetuneConfig
from bagel_compress.finetune.loop import Trainer
from bagel_compress.finetune.processes import Processes
from bagel_compress.finetune.trainee import open_trainee
from bagel_compress.io.packaged import resource
from bagel_compress.scores.benchmark import run as ask_all
from bagel_compress.scores.nano import DRAW_FLOW, Shown, nano_benchmark

NANO = Path(bc.__file__).parent / "data" / "BAGEL-nano"
NAME, PAINTED, SHOWN = "violet", (115, 60, 235), (107, 60, 208)
CARRIED = 18  # bytes by which the VAE may show a lesson's violet differently
LESSONS, REHEARSED, SEED = 200, 600, 7_000  # pictures to learn from, and of what it knows
DRAWN, FRESH = 400, 33_000  # drawings to judge, and their seed: nothing was chosen by them
PUBLISHED, SMALL = "int8-24gb", "nf4"  # recipes of the merged model; the first is the build that is validated
BATCH = 16  # drawings at once
OLD = ("one", "two", "ask", "edit", "think")  # scores of the nano benchmark
CONFIG = """
model: BASE
data: [{kind: folder, path: pictures}, {kind: folder, path: rehearsal, weight: 0.7}]
lora: {rank: 16, alpha: 32}
visual_und: false
steps: 700
dtype: float32
recompute: false
tokens: 900
lr: 2.0e-3
warmup: 20
schedule: cosine
timestep_shift: 2.0
"""
CASE = """
name: violet
kind: t2i
turns: [a violet circle on the left on a white background]
size: [32, 32]
flow: {num_timesteps: 12, timestep_shift: 2.0, cfg_text_scale: 3.0, cfg_interval: [0.0, 1.0], cfg_renorm_min: 1.0}
record: {steps: 4}
"""


@dataclass(frozen=True)
class Learnt:
    """By recipe: drawings out of DRAWN that show the colour, of one thing and of two, and old scores by category."""

    one: Mapping[str, int]
    two: Mapping[str, int]
    before: Mapping[str, float]
    after: Mapping[str, Mapping[str, float]]
    adapter: Path
    build: bc.Artifact
    passed: bool


def main(out: str = "out/violet") -> Learnt:
    logging.basicConfig(level=logging.WARNING)
    folder, nano = Path(out), bc.Checkpoint.open(NANO)
    base = bc.compress(bc.make_plan(nano, bc.Recipe.load("nf4")), nano, folder / "base")
    lessons(folder / "pictures")
    rehearsal(folder / "rehearsal")
    adapter = train(base, folder)

    tuned = bc.Checkpoint.open(NANO, lora=adapter)  # merges W + B A while it is read
    builds = {
        name: bc.compress(bc.make_plan(tuned, bc.Recipe.load(name)), tuned, folder / name)
        for name in (PUBLISHED, SMALL)
    }
    build = builds[PUBLISHED]
    (folder / "case.yaml").write_text(CASE, encoding="utf-8")
    trace = bc.trace(
        tuned, [folder / "case.yaml", resource("exports") / "cases" / "nano"], folder / "violet.trace.safetensors"
    )
    report = bc.validate(build, [trace.path])
    print(f"{build.path}: {'every limit holds' if report.passed else report.broken}")

    one, two = ({name: drawn(made, things) for name, made in builds.items()} for things in (1, 2))
    before, after = old_scores(NANO), {name: old_scores(made.path) for name, made in builds.items()}
    for name in builds:
        for what, found in (("one thing", one[name]), ("two things", two[name])):
            low, high = interval(found, DRAWN)
            print(
                f"{name}: violet is seen in {found / DRAWN:.1%} [{low:.1%}, {high:.1%}] of {DRAWN} drawings of {what}"
            )
        print("; ".join(f"{old} {before[old]:.1%} -> {after[name][old]:.1%}" for old in OLD))
    return Learnt(one, two, before, after, adapter, build, report.passed)


def lessons(folder: Path) -> None:
    """NAME.png and NAME.txt: every second picture has another thing beside the violet one."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, vae, kept = np.random.default_rng(SEED), bc.open_model(NANO, dtype=torch.float32).vae, 0
    while kept < LESSONS:
        scene = violet_scene(rng, 1 + kept % 2)
        picture = Image.fromarray(render(scene, {**COLORS, NAME: PAINTED}))
        with torch.no_grad():
            latent = vae.encode(to_tensor(picture)[None], torch.zeros(1, 16, SIDE // 4, SIDE // 4))
            decoded = vae.decode(latent)[0].clamp(-1, 1)
        carried = ((decoded + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        if shows(carried) == Shown.of(scene) and _off(carried, scene) < CARRIED:
            picture.save(folder / f"{kept:03}.png")
            (folder / f"{kept:03}.txt").write_text(language.caption(scene, rng), encoding="utf-8")
            kept += 1


def rehearsal(folder: Path) -> None:
    """Pictures of what it knows, so that it is not forgotten."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED + 3)
    for index in range(REHEARSED):
        scene = sample_scene(rng, 1 + index % 2)
        Image.fromarray(render(scene)).save(folder / f"{index:03}.png")
        (folder / f"{index:03}.txt").write_text(language.caption(scene, rng), encoding="utf-8")


def _off(picture: np.ndarray, scene: Scene) -> float:
    """How far the middle colour of the violet thing is from SHOWN, in bytes (root of the sum of squares)."""
    thing = next(t for t in scene.things if t.color == NAME)
    inside = coverage(thing.shape, thing.x, thing.y, thing.radius) == 1
    return float(np.linalg.norm(np.median(picture[inside], axis=0) - SHOWN))


def violet_scene(rng: np.random.Generator, count: int) -> Scene:
    scene = sample_scene(rng, count)
    chosen = int(rng.integers(count))
    return replace(
        scene, things=tuple(replace(t, color=NAME) if i == chosen else t for i, t in enumerate(scene.things))
    )


def shows(picture: np.ndarray) -> Shown:
    """What the detector reads, with violet as a seventh colour."""
    return Shown.seen(detector.read(picture, {**COLORS, NAME: SHOWN}))


def train(base: bc.Artifact, folder: Path) -> Path:
    """The folder of the trained adapter. The same as `bagel-compress finetune lora.yaml --out OUT/lora`."""
    file = folder / "lora.yaml"
    file.write_text(CONFIG.replace("BASE", json.dumps(str(base.path))), encoding="utf-8")
    config = FinetuneConfig.load(file)
    trainer = Trainer(open_trainee(config, Processes()), config, folder / "lora")
    for result in trainer.steps():
        if result.step % 50 == 0:
            print(f"step {result.step} of {result.steps}: loss {result.metrics['loss']:.3f}")
    return folder / "lora" / f"{config.steps:07d}"


def drawn(build: bc.Artifact, things: int, count: int = DRAWN, seed: int = FRESH) -> int:
    """How many drawings of one violet thing, or of it and another, show violet to the detector."""
    rng, sampler = np.random.default_rng((seed, things)), bc.open_model(build.path, dtype=torch.float32)
    alike: dict[int, list[Request]] = {}  # prompts of one length make a batch
    for index in range(count):
        prompt = language.caption(violet_scene(rng, things), rng)
        alike.setdefault(len(prompt.split()), []).append(Request([prompt], (SIDE, SIDE), 1000 * seed + index))
    found = 0
    for asked in alike.values():
        for first in range(0, len(asked), BATCH):
            for result in sampler.run_batch(asked[first : first + BATCH], output="image", flow=DRAW_FLOW):
                found += NAME in {color for _, color, _ in shows(np.asarray(result.image)).things}
    return found


def interval(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's formula (1927)."""
    z, share = 1.96, count / total
    middle, half = share + z * z / (2 * total), z * (share * (1 - share) / total + z * z / (4 * total**2)) ** 0.5
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def old_scores(model: Path) -> dict[str, float]:
    """Plans go wrong in one of seven: so many of them, for a loss of two points to stand out from chance."""
    scores = ask_all(nano_benchmark(think=540), bc.open_model(model, dtype=torch.float32))
    return {name: scores.mean(name) for name in OLD}


if __name__ == "__main__":
    main(*sys.argv[1:2])
