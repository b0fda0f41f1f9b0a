"""Training repeats bit by bit, goes on where it was cut, and lowers both losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bagel.sampler import Sampler
from bagel.settings import FlowSettings
from bagel_compress.nano_training.batches import Mix
from bagel_compress.nano_training.reproduce import NAME, NanoRecipe, reproduce
from bagel_compress.nano_training.train import ModelRecipe, TrainingPhase, TrainingProgress
from bagel_compress.nano_training.vae_train import VAERecipe


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(vae: int, vit: int, und: int, draw: int, mix: int, share: int) -> NanoRecipe:
    """A short run with batches that are 1/share of the real ones."""
    small = Mix(draw=24 // share, ask=8 // share, edit=10 // share, think=max(1, 3 // share))
    model = ModelRecipe(
        vit=TrainingPhase(vit, 2e-3, 2, 0.5, 0.05, vit_rate=1.0),
        und=TrainingPhase(und, 2e-3, 2, 0.0, 1.0),
        draw=TrainingPhase(draw, 2e-3, 2, 0.0, 1.0, ce_weight=0.3),
        mix=TrainingPhase(mix, 2e-3, 2, 0.0, 1.0),
        polish=TrainingPhase(mix, 2e-3, 2, 0.85, 0.02),
        bind=TrainingPhase(mix, 2e-3, 2, 0.85, 0.02),
        vit_batch=32 // share,
        und_batch=Mix(ask=24 // share),
        draw_batch=small,
        mix_batch=small,
        polish_batch=small,
        bind_batch=small,
    )
    return NanoRecipe(
        VAERecipe(steps=vae, batch=max(2, 8 // share)),
        model,
        scenes=240 // share,
        edits=120 // share,
    )


def test_a_cut_run_ends_where_an_uncut_one_does(tmp_path: Path) -> None:
    plan = recipe(vae=2, vit=2, und=2, draw=2, mix=3, share=8)
    steps = [(p.phase, p.step) for p in reproduce(tmp_path / "whole", plan)]
    lengths = {"vae": 2, "vit": 2, "und": 2, "draw": 2, "mix": 3, "polish": 3, "bind": 3}
    assert steps == [(phase, i + 1) for phase, length in lengths.items() for i in range(length)]
    for limit in (1, 3, 4, 2, 1):  # cut four times, in every stage
        run = reproduce(tmp_path / "cut", plan, save_seconds=0.0)
        for _ in range(limit + 1):  # the state of a step is written when the next one is asked for
            if next(run, None) is None:
                break
        run.close()
    list(reproduce(tmp_path / "cut", plan))
    for file in ("ema.safetensors", "ae.safetensors"):
        assert (tmp_path / "whole" / NAME / file).read_bytes() == (tmp_path / "cut" / NAME / file).read_bytes()
    sampler = Sampler.from_dir(tmp_path / "cut" / NAME, dtype=torch.float32)
    assert sampler.run(["a red circle"], size=(32, 32), flow=FlowSettings(num_timesteps=3)).image is not None


@pytest.mark.slow
def test_three_minutes_lower_both_losses_and_repeat(tmp_path: Path) -> None:
    plan = recipe(vae=200, vit=300, und=120, draw=100, mix=10, share=2)
    runs = [list(reproduce(tmp_path / name, plan)) for name in ("first", "second")]
    for phase, metric in (("vae", "loss"), ("vit", "loss"), ("und", "ce"), ("draw", "mse")):
        values = _values(runs[0], phase, metric)
        assert sum(values[-5:]) < 0.9 * sum(values[:5]), (phase, metric)
        assert values == _values(runs[1], phase, metric)
    for file in ("ema.safetensors", "ae.safetensors"):
        assert (tmp_path / "first" / NAME / file).read_bytes() == (tmp_path / "second" / NAME / file).read_bytes()


def _values(run: list[TrainingProgress], phase: str, metric: str) -> list[float]:
    return [p.metrics[metric] for p in run if p.phase == phase]
