"""Artifacts opened by other people's libraries, from the shards and config.json alone: no manifest, no code of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import find_recipe
from bagel_compress.source.checkpoint import Checkpoint

NAME = "language_model.model.layers.1.mlp_moe_gen.gate_proj"


def opened(tiny: Checkpoint, recipe: str, out: Path) -> tuple[Artifact, dict[str, torch.Tensor], dict[str, Any]]:
    """The artifact, its tensors as the index lists them, and its quantization_config."""
    artifact = compress(make_plan(tiny, Recipe.load(find_recipe(recipe))), tiny, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(out / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - no dict
    assert tensors.keys() == index["weight_map"].keys()
    return artifact, tensors, json.loads((out / "config.json").read_text())["quantization_config"]


def module_names(artifact: Artifact, format: str) -> list[str]:
    units = artifact.manifest.units
    return [name.removesuffix(".weight") for name, unit in units.items() if unit.codec.format == format]


@pytest.mark.loader
@pytest.mark.parametrize("recipe", ["nf4", "nf4-official", "nf4-12gb"])
def test_bitsandbytes_loads_nf4(
    tiny: Checkpoint, tmp_path: Path, recipe: str, bnb_decoded: Callable[..., torch.Tensor]
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    artifact, tensors, config = opened(tiny, recipe, tmp_path / "a")
    parsed = transformers.BitsAndBytesConfig.from_dict(config)
    assert parsed.load_in_4bit
    assert parsed.bnb_4bit_use_double_quant == (recipe != "nf4-official")
    names = module_names(artifact, "nf4")
    assert len(names) == {"nf4": 42, "nf4-official": 42 + 1 + 6 + 13, "nf4-12gb": 42}[recipe]  # head, bridges, ViT
    assert not set(names) & set(parsed.llm_int8_skip_modules)
    for name in names:
        stats = {k[len(name) + 8 :]: v for k, v in tensors.items() if k.startswith(f"{name}.weight.")}
        weight = bnb.nn.Params4bit.from_prequantized(tensors[f"{name}.weight"], stats, device="cpu")
        theirs = bnb_decoded(weight.data, weight.quant_state)
        assert theirs.equal(artifact.decode(f"{name}.weight")[f"{name}.weight"])


@pytest.mark.loader
def test_bitsandbytes_loads_int8(tiny: Checkpoint, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    artifact, tensors, config = opened(tiny, "int8-24gb", tmp_path / "a")
    assert config["load_in_8bit"] is True
    assert len(module_names(artifact, "int8")) == 42
    codes, scb = tensors[f"{NAME}.weight"], tensors[f"{NAME}.SCB"]
    weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scb)
    theirs = bnb.functional.int8_vectorwise_dequant(weight.CB, weight.SCB).bfloat16()
    assert theirs.equal(artifact.decode(f"{NAME}.weight")[f"{NAME}.weight"])


def test_compressed_tensors_loads_fp8(tiny: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    artifact, tensors, config = opened(tiny, "fp8-24gb", tmp_path / "a")
    parsed = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "quant_method"})
    (scheme,) = parsed.config_groups.values()
    names = module_names(artifact, "fp8")
    assert len(names) == 42
    assert not set(names) & set(parsed.ignore)
    for name in names:
        state = {"weight": tensors[f"{name}.weight"], "weight_scale": tensors[f"{name}.weight_scale"]}
        theirs = FloatQuantizationCompressor.decompress(state, scheme)["weight"]
        assert theirs.equal(artifact.decode(f"{name}.weight")[f"{name}.weight"])
