"""From seeds to a checkpoint folder: autoencoder, latents, the phases of the model, export.

`reproduce` yields after every step, writes its state every few minutes and at the end of every stage, and goes on from
the state it finds. Same machine, thread count and recipe: the same bytes. The device is the CPU, in fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel.text import TextCodec
from bagel_compress.nano_training import export, tokens, vae_train
from bagel_compress.nano_training.batches import BIND_TURNS, EDIT_TURNS, Pool, make_pool
from bagel_compress.nano_training.train import PHASES, UNDERSTANDING, ModelRecipe, ModelTrainer, TrainingProgress
from bagel_compress.nano_training.vae_train import VAETrainer

NAME = "BAGEL-nano"
SAVE_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class NanoRecipe:
    """Everything that determines the checkpoint."""

    vae: vae_train.VAERecipe = field(default_factory=vae_train.VAERecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    scenes: int = 5000
    edits: int = 8000
    pool_seed: int = 1


def reproduce(out: Path, recipe: NanoRecipe, save_seconds: float = SAVE_SECONDS) -> Iterator[TrainingProgress]:
    """Trains into `out`: states and log beside the checkpoint, which is `out/BAGEL-nano`. Resumes what it finds."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokens.build()
    tokens.save(tokenizer, out)
    vae = VAETrainer(recipe.vae)
    yield from _saved(out / "vae.state.safetensors", vae.state, vae.load, _vae_steps(vae), save_seconds)
    model = ModelTrainer(recipe.model, TextCodec.from_dir(out))
    state = out / "model.state.safetensors"
    yield from _saved(state, model.state, model.load, _model_steps(model, recipe, vae), save_seconds)
    export.save(out / NAME, model.averaged(), vae.averaged(), tokenizer)


def _vae_steps(trainer: VAETrainer) -> Iterator[TrainingProgress]:
    for metrics in trainer.steps():
        yield TrainingProgress("vae", trainer.step, trainer.recipe.steps, metrics)


def _model_steps(trainer: ModelTrainer, recipe: NanoRecipe, vae: VAETrainer) -> Iterator[TrainingProgress]:
    """The phases from the current one on; latents are encoded when drawing begins (or is resumed)."""
    pool: Pool | None = None
    for phase in PHASES[PHASES.index(trainer.phase) :]:
        if phase == "bind":
            pool = make_pool(vae.averaged(), recipe.pool_seed + 1, recipe.scenes, recipe.edits, BIND_TURNS)
        elif phase not in UNDERSTANDING and pool is None:
            pool = make_pool(vae.averaged(), recipe.pool_seed, recipe.scenes, recipe.edits, EDIT_TURNS)
        yield from trainer.steps(phase, pool)


def _saved(
    file: Path,
    state: Callable[[], Mapping[str, Tensor]],
    load: Callable[[Mapping[str, Tensor]], None],
    steps: Iterator[TrainingProgress],
    seconds: float,
) -> Iterator[TrainingProgress]:
    """The steps, with the state loaded first if there is one, saved now and then, and saved at the end."""
    if file.exists():
        load(load_file(file))
    last = time.monotonic()
    for progress in steps:
        yield progress
        if time.monotonic() - last > seconds:
            _write(file, state())
            last = time.monotonic()
    _write(file, state())


def _write(file: Path, state: Mapping[str, Tensor]) -> None:
    """Written beside and renamed: a cut never leaves half a state."""
    partial = file.with_suffix(".partial")
    save_file({n: t.contiguous() for n, t in state.items()}, partial)
    partial.replace(file)
