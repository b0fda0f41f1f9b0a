"""The base model's calibration set serves its fine-tunes: a BAGEL-nano trained on, on a world with other colours."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bagel import training
from bagel.images import resized
from bagel.inputs import to_tensor
from bagel.loading import parameter_path
from bagel.nano import language
from bagel.nano.scenes import render, sample_scene
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import find_recipe, resource
from bagel_compress.nano_training.batches import images_to_tensor
from bagel_compress.run.load import open_model
from bagel_compress.source.checkpoint import Checkpoint

STEPS, SAMPLES, RATE = 240, 12, 3e-4
SEED = 96_041  # of prompts that nothing else asks
MOST = 0.55  # of the error of each weight rounded alone


def fine_tune(out: Path) -> float:
    """Writes BAGEL-nano after STEPS more, with the colours of pictures turned round; returns how far weights moved."""
    source = resource("BAGEL-nano")
    sampler = open_model(source, dtype=torch.float32)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    trained = {n: p for n, p in sampler.bagel.named_parameters() if n.startswith("layers.") and p.ndim == 2}
    before = {name: p.detach().clone() for name, p in trained.items()}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        items: list[list[training.Item]] = []
        for _ in range(SAMPLES):
            scene = sample_scene(rng)
            picture = np.ascontiguousarray(render(scene)[..., [1, 2, 0]])  # red things are drawn in another colour
            pixels = images_to_tensor(picture[None])
            side = pixels.shape[-1] // sampler.vae.config.downsample
            with torch.no_grad():
                noise = torch.randn((1, sampler.vae.config.z_channels, side, side), generator=generator)
                latent = sampler.vae.encode(pixels, noise)[0]
            draw = float(torch.randn(1, generator=generator))
            items.append([training.TextItem(language.caption(scene)), training.LatentItem(latent, draw)])
            seen = training.ViTItem(to_tensor(resized(Image.fromarray(picture), sampler.bagel.config.vit_rule)))
            asked = language.question(scene, language.kinds_for(scene)[0], rng)
            items.append([seen, training.TextItem(asked.text), training.TextItem(asked.answer, loss=True)])
        batch = training.pack(sampler.bagel, sampler.text, items)
        losses = training.forward(sampler.bagel, batch, torch.randn(batch.latents.shape, generator=generator))
        loss = losses.mse.mean() + 0.3 * losses.ce.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    shutil.copytree(source, out)
    tensors = load_file(out / "ema.safetensors")
    for name in tensors:
        if (path := parameter_path(name)) in trained:
            tensors[name] = trained[path].detach().to(tensors[name].dtype)
    save_file(tensors, out / "ema.safetensors")
    moved = sum(float((trained[n].detach() - before[n]).square().sum()) for n in trained)
    return (moved / sum(float(b.square().sum()) for b in before.values())) ** 0.5


@pytest.mark.slow
def test_the_set_of_the_base_calibrates_a_fine_tune(tmp_path: Path) -> None:
    paired = _paired_nano()
    torch.set_num_threads(1)
    moved = fine_tune(tmp_path / "tuned")
    assert moved > 0.02  # of the weights' norm: a fine-tune, not the base
    checkpoint = Checkpoint.open(tmp_path / "tuned")
    benchmark = paired.fresh(SEED, (12, 0, 12, 0))
    reference = paired.answers(benchmark, open_model(tmp_path / "tuned", dtype=torch.float32))
    base = paired.answers(benchmark, open_model(resource("BAGEL-nano"), dtype=torch.float32))
    assert float(paired.path_errors(base, reference).mean()) > 0.1  # it draws other pictures than the base
    errors = {}
    for name in ("nf4-nearest", "nf4"):
        plan = make_plan(checkpoint, Recipe.load(find_recipe(name)))  # takes the packaged set, of the base
        artifact = compress(plan, checkpoint, tmp_path / name)
        errors[name] = paired.path_errors(
            paired.answers(benchmark, open_model(artifact.path, dtype=torch.float32)), reference
        )
    value, low, high = paired.ratio(errors["nf4"], errors["nf4-nearest"])
    print(f"weights moved by {moved:.3f}; nf4 over nf4-nearest {value:.3f} [{low:.3f}, {high:.3f}]")
    assert high <= MOST


def _paired_nano():  # type: ignore[no-untyped-def]
    file = Path(__file__).parents[2] / "benchmarks" / "paired_nano.py"
    spec = importlib.util.spec_from_file_location("paired_nano", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paired_nano"] = module
    spec.loader.exec_module(module)
    return module
