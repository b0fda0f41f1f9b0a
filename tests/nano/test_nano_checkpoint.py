"""The committed checkpoint: small, complete, and as good as its card says (the targets were set before training)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bagel.loading import load_vae
from bagel.nano.detector import read
from bagel.nano.scenes import render, sample_scene
from bagel.nano.vae_train import reconstruct
from bagel.vae import to_uint8
from bagel_compress.load import open_model
from bagel_compress.validate.nano import Shown, nano_benchmark
from bagel_compress.validate.scores import Scores, run

CHECKPOINT = Path(__file__).parents[2] / "bagel_compress" / "data" / "BAGEL-nano"
MAX_BYTES = 15_000_000
TARGETS = {"one": 0.90, "two": 0.80, "ask": 0.90, "edit": 0.80, "think": 0.80}


def scores(draw: int, ask: int, edit: int, think: int) -> Scores:
    return run(nano_benchmark(draw, ask, edit, think), open_model(CHECKPOINT, dtype=torch.float32))


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= MAX_BYTES


def test_it_draws_answers_and_plans() -> None:
    found = scores(24, 21, 0, 6)
    for category in ("one", "two", "ask", "think"):
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
def test_it_reaches_every_target_and_no_question_is_at_chance() -> None:
    from bagel.nano.language import CHANCE

    found = scores(240, 168, 100, 60)
    for category, target in TARGETS.items():
        assert found.mean(category) >= target, category
    for kind, chance in CHANCE.items():
        assert found.interval(f"ask.{kind}")[0] > chance, kind
