"""The committed checkpoint: small, complete, and as good as its card says (the targets were set before training)."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bagel.loading import load_vae
from bagel.nano.detector import read
from bagel.nano.scenes import render, sample_scene
from bagel.vae import to_uint8
from bagel_compress.nano_training.vae_train import reconstruct
from bagel_compress.run.load import open_model
from bagel_compress.scores.benchmark import Scores, run
from bagel_compress.scores.nano import Shown, nano_benchmark

CHECKPOINT = Path(__file__).parents[2] / "bagel_compress" / "data" / "BAGEL-nano"
MAX_BYTES = 15_000_000
TARGETS = {"one": 0.90, "two": 0.80, "ask": 0.90, "edit": 0.80, "think": 0.80}


def scores(draw: int, ask: int, edit: int, think: int) -> Scores:
    return run(nano_benchmark(draw, ask, edit, think), open_model(CHECKPOINT, dtype=torch.float32))


def card() -> str:
    return (CHECKPOINT / "README.md").read_text(encoding="utf-8")


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= MAX_BYTES


def test_the_card_is_about_these_files() -> None:
    named = re.findall(r"^\| `(\w+\.safetensors)` \| `([0-9a-f]{64})` \|$", card(), re.MULTILINE)
    assert dict(named).keys() == {"ema.safetensors", "ae.safetensors"}
    for file, digest in named:
        assert hashlib.sha256((CHECKPOINT / file).read_bytes()).hexdigest() == digest, file


def test_it_draws_answers_edits_and_plans() -> None:
    found = scores(24, 21, 20, 6)
    for category in TARGETS:
        assert found.mean(category) >= TARGETS[category], category


def test_the_autoencoder_holds_every_shape() -> None:
    rng = np.random.default_rng(77)
    scenes = [sample_scene(rng) for _ in range(100)]
    images = to_uint8(
        reconstruct(load_vae(CHECKPOINT, torch.device("cpu")), np.stack([render(s) for s in scenes]), seed=1)
    )
    read_back = [Shown.seen(read(image)) for image in images.permute(0, 2, 3, 1).numpy()]
    assert sum(a == Shown.of(b) for a, b in zip(read_back, scenes, strict=True)) >= 98


@pytest.mark.slow
def test_it_reaches_every_target_and_scores_what_its_card_says() -> None:
    from bagel.nano.language import CHANCE

    found = scores(240, 168, 100, 60)
    for category, target in TARGETS.items():
        assert found.mean(category) >= target, category
    for kind, chance in CHANCE.items():
        assert found.interval(f"ask.{kind}")[0] > chance, kind
    stated = re.findall(r"^\| `([\w.]+)` \|.*\| (\d+) \| ([\d.]+) \(([\d.]+)\.\.([\d.]+)\) \|$", card(), re.MULTILINE)
    assert {"one", "two", "ask", "edit", "edit.recolor", "think"} <= {name for name, *_ in stated}
    for name, prompts, _, low, high in stated:
        assert len(found.values[name]) == int(prompts), name
        assert float(low) - 0.05 <= 100 * found.mean(name) <= float(high) + 0.05, name  # rounded to a tenth
