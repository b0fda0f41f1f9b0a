"""Builds with `serve: vllm-omni`: what its loader needs is there, and its own code takes the folder.

vllm and vllm-omni 0.30 go into an environment of their own, `pip install --no-deps`; without them the test is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bagel.loading import weight_files
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.errors import RecipeError
from bagel_compress.source.checkpoint import Checkpoint

RECIPES = ("bf16-32gb", "fp8-vllm")


def built(tiny: Checkpoint, recipe: str, out: Path) -> Artifact:
    return compress(make_plan(tiny, Recipe.load(recipe)), tiny, out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_index_names_every_tensor_of_the_folder(tiny: Checkpoint, tmp_path: Path, recipe: str) -> None:
    artifact = built(tiny, recipe, tmp_path / "a")
    index = json.loads((artifact.path / "model.safetensors.index.json").read_text("utf-8"))
    found, size = {}, 0
    for file in artifact.path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file.name)
            size += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == size
    assert {"encoder.conv_in.weight", "latent_pos_embed.pos_embed"} <= found.keys()
    assert not {"encoder.conv_in.weight", "decoder.conv_in.weight"} & weight_files(artifact.path).keys()
    processor = json.loads((artifact.path / "preprocessor_config.json").read_text("utf-8"))
    assert processor["size"]["height"] == tiny.configs["vit_config.json"]["image_size"]
    assert artifact.verify() == []


def test_a_bf16_build_without_its_manifest_is_a_checkpoint(tiny: Checkpoint, tmp_path: Path) -> None:
    artifact = built(tiny, "bf16-32gb", tmp_path / "a")
    (artifact.path / "manifest.json").unlink()
    assert Checkpoint.open(artifact.path).digest == tiny.digest


def test_formats_that_the_server_does_not_take_are_refused() -> None:
    with pytest.raises(RecipeError, match="takes raw and fp8 with dialect vllm, found codec int4"):
        Recipe.parse("name: x\nserve: vllm-omni\nrules: [{match: {}, codec: int4}]", "x.yaml")
    assert "serve" not in Recipe.load("fp8-24gb").model_dump()


@pytest.mark.loader
@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_vllm_omni_takes_the_folder(tiny: Checkpoint, tmp_path: Path, recipe: str) -> None:
    pytest.importorskip("vllm_omni", reason="vllm-omni is not installed")
    from transformers import SiglipImageProcessor
    from vllm.config.load import LoadConfig
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

    artifact = built(tiny, recipe, tmp_path / "a")
    config = OmniDiffusionConfig(model=str(artifact.path), dtype=torch.bfloat16)
    config.enrich_config()
    assert config.model_class_name == "BagelPipeline"
    assert SiglipImageProcessor.from_pretrained(artifact.path, local_files_only=True).size["height"] > 0
    loader = DiffusersPipelineLoader(LoadConfig(), config)
    source = loader.ComponentSource(str(artifact.path), None, None, "", fall_back_to_pt=False)
    theirs = dict(loader._get_weights_iterator(source))
    for file in artifact.path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                mine = tensors.get_tensor(name)
                assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (theirs.pop(name), mine))), name
    assert not theirs
    if recipe == "bf16-32gb":
        assert config.quantization_config is None
    else:
        expect_stored_codes(config.quantization_config, artifact)


def expect_stored_codes(quantization, artifact: Artifact) -> None:  # type: ignore[no-untyped-def]
    """Its FP8 method reads stored codes in exactly the linears that have them; names are those of its pipeline."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    assert quantization.get_name() == "fp8"
    assert quantization.is_checkpoint_fp8_serialized
    for name, unit in artifact.manifest.units.items():
        if name.startswith(("language_model.model.layers.", "connector.")) and name.endswith(
            ("proj.weight", "fc1.weight")
        ):
            module = "bagel." + name.removesuffix(".weight")
            assert is_layer_skipped(module, quantization.ignored_layers) == (not isinstance(unit.codec, Fp8)), name
