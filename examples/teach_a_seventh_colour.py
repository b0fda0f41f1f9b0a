"""Teach the small model a colour that it does not know, over a base that stays compressed, and ship the result.

    python examples/teach_a_seventh_colour.py [OUT] [STEPS]

200 captioned pictures are written; a LoRA of the generation expert is trained over an NF4 build; the adapter is merged
into the full-precision model, which is compressed and validated. At the end a detector counts what is drawn. With your
own pictures only `pictures` changes. About five minutes of one CPU core.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import bagel_compress as bc
from bagel.nano import language
from bagel.nano.detector import read
from bagel.nano.scenes import COLORS, SIDE, Scene, recoloured, render, sample_scene
from bagel_compress.finetune.config import FinetuneConfig
from bagel_compress.finetune.loop import Trainer
from bagel_compress.finetune.processes import Processes
from bagel_compress.finetune.trainee import open_trainee
from bagel_compress.scores.benchmark import Answer, Benchmark, Prompt, run
from bagel_compress.scores.nano import DRAW_FLOW

NANO = Path(bc.__file__).parent / "data" / "BAGEL-nano"
NEW = "cyan"
PALETTE = COLORS | {NEW: (40, 205, 215)}
RECIPE = "nf4-nearest"
CASE = """
name: cyan
kind: t2i
turns: [a cyan circle on the left on a white background]
size: [32, 32]
flow: {num_timesteps: 8, timestep_shift: 2.0, cfg_text_scale: 3.0, cfg_interval: [0.0, 1.0], cfg_renorm_min: 1.0}
record: {steps: 4}
"""


def scene_with_it(rng: np.random.Generator) -> Scene:
    """A scene in which one thing has the new colour."""
    scene = sample_scene(rng)
    index = int(rng.integers(len(scene.things)))
    things = tuple(recoloured(t, NEW) if i == index else t for i, t in enumerate(scene.things))
    return Scene(scene.background, scene.tint, things)


def pictures(folder: Path, count: int = 200) -> None:
    """A folder of pictures with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for number in range(count):
        scene = scene_with_it(rng)
        Image.fromarray(render(scene, PALETTE)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(language.caption(scene, rng), encoding="utf-8")


def train(base: Path, data: Path, out: Path, steps: int) -> Path:
    """The adapter's folder."""
    config = FinetuneConfig.model_validate({
        "model": str(base), "data": [{"kind": "folder", "path": str(data)}], "steps": steps, "tokens": 2048,
        "lr": 2e-3, "warmup": 20, "schedule": "cosine", "recompute": False, "save_every": 100,
        "lora": {"rank": 16, "alpha": 32, "match": [{"component": "llm", "expert": "gen", "kind": "linear"}]},
    })  # fmt: skip
    trainer = Trainer(open_trainee(config, Processes()), config, out)
    for done in trainer.steps():
        if done.step % 20 == 0:
            print(f"{done.step}/{steps}  mse {done.metrics['mse']:.4f}  {done.metrics['seconds']:.2f} s", flush=True)
    return out / f"{steps:07d}"


def share_drawn(model: str | Path | bc.Artifact, count: int = 100) -> float:
    """Share of pictures whose things have the colours that were asked for, one of them the new one."""
    rng = np.random.default_rng(30_000)  # other scenes than those trained on
    scenes = [scene_with_it(rng) for _ in range(count)]
    prompts = tuple(
        Prompt("new", (language.caption(s, rng),), size=(SIDE, SIDE), wanted=sorted(t.color for t in s.things))
        for s in scenes
    )

    def right(prompt: Prompt, answer: Answer) -> dict[str, float]:
        seen = read(np.asarray(answer.image), PALETTE)
        return {"new": float(sorted(t.color for t in seen.things) == prompt.wanted)}

    sampler = bc.open_model(model.path if isinstance(model, bc.Artifact) else model, dtype=torch.float32)
    return run(Benchmark("seventh colour", prompts, right, {"": DRAW_FLOW}), sampler).mean("new")


def main(out: str = "out/seventh-colour", steps: str = "300") -> dict[str, float]:
    folder = Path(out)
    recipe = bc.Recipe.load(RECIPE)
    original = bc.Checkpoint.open(NANO)
    base = bc.compress(bc.make_plan(original, recipe), original, folder / "base")
    pictures(folder / "pictures")
    adapter = train(base.path, folder / "pictures", folder / "run", int(steps))

    merged = bc.Checkpoint.open(NANO, lora=adapter)
    tuned = bc.compress(bc.make_plan(merged, recipe), merged, folder / "tuned")
    (folder / "cases").mkdir(exist_ok=True)
    (folder / "cases" / "cyan.yaml").write_text(CASE, encoding="utf-8")
    trace = bc.trace(merged, [folder / "cases"], folder / "merged.trace.safetensors")
    bc.validate(tuned, [trace.path]).require()  # the build against the merged model, within the recipe's limits
    shares = {"before": share_drawn(NANO), "after": share_drawn(tuned)}
    print(f"{NEW} as asked: {shares['before']:.0%} before, {shares['after']:.0%} after; {tuned.path} is valid")
    return shares


if __name__ == "__main__":
    main(*sys.argv[1:])
