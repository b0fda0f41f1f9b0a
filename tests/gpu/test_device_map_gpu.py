"""Device maps on GPUs: the bits of one card; what waits is brought; what lies on a card is what was planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bagel.flow import FlowSettings
from bagel.sampler import Sampler, TextSettings
from bagel_compress.budgets.device_option import choose_device
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import find_recipe
from bagel_compress.run.device_map import DeviceMap
from bagel_compress.run.load import load
from bagel_compress.source.checkpoint import Checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
TINY = Path(__file__).parents[1] / "data" / "golden" / "checkpoint"
FLOW = FlowSettings(num_timesteps=4, cfg_interval=(0.0, 1.0))
RECIPES = ["nf4", "int8-24gb", "fp8-24gb", "df11", "raw"]


def artifact_of(recipe: str, folder: Path) -> Artifact:
    checkpoint = Checkpoint.open(TINY)
    return compress(make_plan(checkpoint, Recipe.load(find_recipe(recipe))), checkpoint, folder / recipe)


def outcome(sampler: Sampler) -> tuple[list[int], torch.Tensor, bytes]:
    """Thoughts, latent and picture: text decoding, denoising and the VAE."""
    result = sampler.run(["a red fox"], think=True, size=(64, 64), flow=FLOW, text=TextSettings(max_tokens=5), seed=1)
    assert result.image is not None
    assert result.latent is not None
    return result.ids, result.latent.cpu(), result.image.tobytes()


def same(a: tuple[list[int], torch.Tensor, bytes], b: tuple[list[int], torch.Tensor, bytes]) -> bool:
    return a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_cards_give_the_bits_of_one(recipe: str, tmp_path: Path) -> None:
    artifact = artifact_of(recipe, tmp_path)
    places = DeviceMap(("cuda:0", "cuda:1", "cuda:1"), "cuda:0", "cuda:1", "cuda:1", "cuda:1")
    spread = load(artifact, places)
    assert spread.bagel.layers[2].und.input_layernorm.weight.device.index == 1
    assert same(outcome(spread), outcome(load(artifact, "cuda:0")))


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "df11"])
def test_what_waits_gives_the_same_bits_and_leaves_the_card(recipe: str, tmp_path: Path) -> None:
    artifact = artifact_of(recipe, tmp_path)
    card = "cuda:0"
    waiting = frozenset({"layers.1", "layers.2", "vit", "vae", "lm_head", "embed_tokens"})
    spread = load(artifact, DeviceMap((card,) * 3, card, card, card, card, waiting))
    assert same(outcome(spread), outcome(load(artifact, card)))
    assert spread.bagel.layers[1].und.input_layernorm.weight.is_meta


def test_auto_takes_the_first_card_for_a_small_model(tmp_path: Path) -> None:
    if torch.cuda.mem_get_info("cuda:0")[0] < 10e9:
        pytest.skip("needs 10 GB free")
    assert choose_device("auto", artifact_of("raw", tmp_path).path) == "cuda"
