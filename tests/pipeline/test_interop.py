"""A build in the official model: which modules hold it, and that they compute with the stored weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from official_standin import provide

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import MissingExtraError
from bagel_compress.interop import official_inferencer, official_model
from bagel_compress.io.packaged import FULL_CONFIGS, find_recipe
from bagel_compress.source.checkpoint import Checkpoint

NAME = "language_model.model.layers.1.mlp_moe_gen.gate_proj"
BIASED = "language_model.model.layers.2.self_attn.q_proj_moe_gen"


def nano_build(recipe: str, out: Path) -> Artifact:
    """Of BAGEL-nano, whose rows are whole blocks of 64: bitsandbytes' kernels for the CPU need that."""
    nano = Checkpoint.open(FULL_CONFIGS.parent / "BAGEL-nano")
    return compress(make_plan(nano, Recipe.load(find_recipe(recipe))), nano, out)


@pytest.mark.parametrize(
    ("recipe", "kind", "most"),
    [("nf4-nearest", "Linear4bit", 0.02), ("int8-24gb", "Linear8bitLt", 0.03), ("fp8-24gb", "Fp8Linear", 0.02)],
)
@pytest.mark.loader
def test_the_official_model_computes_with_what_is_stored(
    recipe: str, kind: str, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`most`: relative error to the decoded weight; bf16 products, and LLM.int8's codes of x."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    artifact = nano_build(recipe, tmp_path / "a")
    provide(monkeypatch, artifact)
    bagel = official_model(artifact.path, "cpu")
    assert [name for name, value in bagel.named_parameters() if value.is_meta] == []
    for name in (NAME, BIASED):
        layer = bagel.get_submodule(name)
        assert type(layer).__name__ == kind
        weight = artifact.decode(f"{name}.weight")[f"{name}.weight"].float()
        x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
        wanted = x.float() @ weight.T
        if name == BIASED:
            wanted = wanted + artifact.decode(f"{name}.bias")[f"{name}.bias"].float()
        assert (layer(x).float() - wanted).norm() < most * wanted.norm()
    norm = "language_model.model.norm_moe_gen.weight"
    assert bagel.get_parameter(norm).equal(artifact.decode(norm)[norm])


def test_the_inferencer_has_the_parts_of_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    artifact = nano_build("raw", tmp_path / "a")
    provide(monkeypatch, artifact)
    inferencer = official_inferencer(artifact, "cpu")
    assert inferencer.rules == ((32, 32, 8), (84, 84, 14))
    assert inferencer.tokenizer == "a"
    assert {value.dtype for value in inferencer.vae.parameters()} == {torch.float32}
    assert inferencer(text="a red teapot")["image"].size == (16, 16)


def test_without_the_official_code_it_says_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"clone https://github\.com/ByteDance-Seed/Bagel"):
        official_model(nano_build("raw", tmp_path / "a"), "cpu")
