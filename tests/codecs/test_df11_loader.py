"""The `dfloat11` package's own loader and hooks on our folders, on a CPU: outputs equal bf16's bit for bit.

The model is a stand-in with the official module names and every weight of the checkpoint in its output: the package
only needs modules to put weights into. Its kernel is the emulator beside this file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from dfloat11_official import package, quiet
from safetensors import safe_open
from torch import nn

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs import DF11
from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.df11.units import pattern_dict
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.source.checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:pkg_resources", "ignore:The given NumPy array is not writable")
CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "checkpoint"
RECIPES = Path(__file__).parents[2] / "recipes"


class Node(nn.Module):
    """A module with children; its output depends on every weight below it, each applied to the input's front."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(8, dtype=x.dtype)
        for value in self.parameters(recurse=False):
            total = total + value.flatten()[:8].sum()
        for child in self.children():
            if isinstance(child, nn.Embedding):
                total = total + child(torch.arange(5)).sum(1)[:1]
            elif isinstance(child, nn.Linear):
                y = child(torch.cat([x] * math.ceil(child.in_features / 8))[: child.in_features])
                total = total + y[:8] * torch.sigmoid(y.sum())
            else:
                total = total + torch.tanh(child(x))
        return total


def official_model(path: Path = CHECKPOINT / "ema.safetensors", fill: bool = True) -> Node:
    """Official module names in bf16; zeros unless filled from the checkpoint."""
    root = Node()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            place(root, name, file.get_tensor(name), fill)
    return root


def place(root: nn.Module, name: str, value: torch.Tensor, fill: bool) -> None:
    *path, leaf = name.split(".")
    for i, part in enumerate(path):
        last = i == len(path) - 1
        if not hasattr(root, part):
            root.add_module(part, leaf_module(part, value) if last and leaf in ("weight", "bias") else Node())
        root = root.get_submodule(part)
    parameter = nn.Parameter(value if fill else torch.zeros_like(value), requires_grad=False)
    if isinstance(root, nn.Linear) and leaf == "weight":
        root.out_features, root.in_features = value.shape
    root.register_parameter(leaf, parameter)


def leaf_module(name: str, value: torch.Tensor) -> nn.Module:
    if name == "embed_tokens":
        return nn.Embedding(*value.shape, device="meta")
    norm = "norm" in name or name == "position_embedding"
    return Node() if norm else nn.Linear(1, 1, bias=False, device="meta")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return {
        name: compress(
            make_plan(checkpoint := Checkpoint.open(CHECKPOINT), Recipe.load(RECIPES / f"{name}.yaml")),
            checkpoint,
            tmp_path_factory.mktemp("df11") / name,
        )
        for name in ("df11", "df11-expert")
    }


@pytest.mark.loader
@pytest.mark.parametrize(("recipe", "units"), [("df11", 3 + 3), ("df11-expert", 3 * 3 + 2)])
def test_the_official_loader_gives_the_same_outputs(built: dict[str, Artifact], recipe: str, units: int) -> None:
    x = torch.linspace(-2, 2, 8).bfloat16()
    expected = official_model()(x)
    model = official_model(fill=False)
    assert not torch.equal(model(x), expected)
    loader, _ = package()
    with quiet():
        model = loader.DFloat11Model.from_pretrained(
            str(built[recipe].path), device="cpu", bfloat16_model=model, device_map=None
        )
        assert sum(hasattr(module, "encoded_exponent") for module in model.modules()) == units
        assert not any("q_proj" in name and name.endswith("weight") for name, _ in model.named_parameters())
        for _ in range(2):
            assert torch.equal(model(x).view(torch.int16), expected.view(torch.int16))


def test_published_patterns(built: dict[str, Artifact]) -> None:
    config = json.loads((built["df11"].path / "config.json").read_text())["dfloat11_config"]
    assert config["threads_per_block"] == [512]
    assert config["bytes_per_thread"] == 8
    assert list(config["pattern_dict"]) == [
        r"language_model\.model\.embed_tokens",
        r"language_model\.model\.layers\.\d+",
        r"language_model\.lm_head",
        "vit_model",
    ]
    assert config["pattern_dict"][r"language_model\.model\.layers\.\d+"] == [
        *(f"self_attn.{p}_proj{expert}" for expert in ("", "_moe_gen") for p in "qkvo"),
        *(f"mlp{expert}.{p}_proj" for expert in ("", "_moe_gen") for p in ("gate", "up", "down")),
    ]
    assert config["pattern_dict"]["vit_model"][:6] == [
        f"vision_model.encoder.layers.0.{name}"
        for name in (
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.q_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        )
    ]
    assert config["pattern_dict"]["vit_model"][-1] == "vision_model.embeddings.patch_embedding"


def linear(name: str) -> TensorSpec:
    return TensorSpec("BF16", (8, 8), f"{name}.weight")


def test_a_rule_that_takes_part_of_a_layer_names_only_that() -> None:
    layer = "language_model.model.layers.{}.mlp{}.{}_proj".format
    specs = [linear(layer(i, "_moe_gen", p)) for i in (10, 2) for p in ("down", "up")]
    specs += [linear(layer(5, "", "up")), linear(layer(5, "_moe_gen", "up"))]
    assert pattern_dict(DF11().units(specs)) == {
        r"language_model\.model\.layers\.(2|10)": ["mlp_moe_gen.up_proj", "mlp_moe_gen.down_proj"],
        r"language_model\.model\.layers\.(5)": ["mlp.up_proj", "mlp_moe_gen.up_proj"],
    }
    by_expert = DF11.model_validate({"units": "expert"}).units(specs)
    assert [unit.name.removeprefix("language_model.model.layers.") for unit in by_expert] == [
        "2.mlp_moe_gen", "5.mlp", "5.mlp_moe_gen", "10.mlp_moe_gen",
    ]  # fmt: skip
    assert pattern_dict(by_expert) == {
        r"language_model\.model\.layers\.(2|10)\.mlp_moe_gen": ["up_proj", "down_proj"],
        r"language_model\.model\.layers\.\d+\.mlp": ["up_proj"],
        r"language_model\.model\.layers\.(5)\.mlp_moe_gen": ["up_proj"],
    }


def test_other_modules_are_units_of_their_own() -> None:
    units = DF11().units([linear("connector.fc1"), linear("time_embedder.mlp.0"), linear("time_embedder.mlp.2")])
    assert pattern_dict(units) == {
        r"connector\.fc1": [],
        r"time_embedder\.mlp\.\d+": [],
    }
    assert [unit.specs[0].name for unit in units if isinstance(unit, Unit)] == [
        "connector.fc1.weight",
        "time_embedder.mlp.0.weight",
        "time_embedder.mlp.2.weight",
    ]
