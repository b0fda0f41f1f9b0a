"""The outline of the build that a recipe would give, from headers alone."""

from __future__ import annotations

from pathlib import Path

from bagel.vae import VAEConfig
from bagel_compress.budgets.fake_model import BuildOutline
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.released_header import TrueHeader


def planned_build(recipe: str | Recipe, source: str | None) -> BuildOutline:
    """The outline of the build that a recipe (object, file or packaged name) would make of a checkpoint.

    `source` None is the released model, of which nothing is downloaded. Raises RecipeError, PlanError, CheckpointError.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if source is None:
        return BuildOutline.of_plan(make_plan(TrueHeader(), chosen))
    checkpoint = Checkpoint.open(source)
    return BuildOutline.of_plan(make_plan(checkpoint, chosen), *checkpoint_sizes(checkpoint))


def checkpoint_sizes(checkpoint: Checkpoint) -> tuple[Path, VAEConfig]:
    """The folder of a checkpoint's configs, and the configuration of its VAE."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.vae.tensors.items()}
    return checkpoint.files["llm_config.json"].parent, VAEConfig.from_shapes(shapes)
