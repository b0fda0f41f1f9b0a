"""The ComfyUI file parses, and its dequantised weights are the artifact's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bagel_compress.build.comfyui_file import comfyui_file
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.cli import main
from bagel_compress.errors import ExportError
from bagel_compress.io.packaged import find_recipe
from bagel_compress.source.checkpoint import Checkpoint


def test_the_file_holds_the_artifacts_weights(tiny: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe.load(find_recipe("fp8-comfyui"))
    artifact = compress(make_plan(tiny, recipe), tiny, tmp_path / "a")
    size = comfyui_file(artifact, tmp_path / "m.safetensors")
    assert size == (tmp_path / "m.safetensors").stat().st_size
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        table = json.loads(file.metadata()["_quantization_metadata"])
        assert table["format_version"] == "1.0"
        assert len(table["layers"]) == 42  # 7 matrices, 2 experts, 3 layers
        for spec in tiny.specs:
            weight = file.get_tensor(spec.name)
            layer = spec.name.removesuffix(".weight")
            if layer in table["layers"]:
                assert table["layers"][layer] == {"format": "float8_e4m3fn"}
                scale = file.get_tensor(f"{layer}.weight_scale")
                assert (scale.dtype, scale.shape) == (torch.float32, ())
                weight = (weight.float() * scale).bfloat16()
            assert weight.equal(artifact.decode(spec.name)[spec.name])
        assert len(file.keys()) == len(tiny.specs) + 42


def test_what_comfyui_cannot_read(tiny: Checkpoint, nf4: Recipe, tmp_path: Path) -> None:
    channel = Recipe.load(find_recipe("fp8-24gb"))
    for name, recipe, says in (("n", nf4, "is nf4"), ("c", channel, "per channel")):
        artifact = compress(make_plan(tiny, recipe), tiny, tmp_path / name)
        with pytest.raises(ExportError, match=says):
            comfyui_file(artifact, tmp_path / "m.safetensors")
    assert not list(tmp_path.glob("m.*"))
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(ExportError, match="exists"):
        comfyui_file(artifact, tmp_path / "m.safetensors")


def test_the_verb(tiny: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compress(make_plan(tiny, Recipe.load(find_recipe("fp8-comfyui"))), tiny, tmp_path / "a")
    out = tmp_path / "m.safetensors"
    assert main(["comfyui", str(tmp_path / "a"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == out.stat().st_size
    assert main(["comfyui", str(tmp_path / "a"), "--out", str(out)]) == 2


@pytest.mark.loader
def test_a_file_without_codes_names_its_model(tiny: Checkpoint, tmp_path: Path) -> None:
    """One bf16 file with original names, no VAE, and the key by which the ComfyUI-BAGEL nodes know it."""
    artifact = compress(make_plan(tiny, Recipe.load(find_recipe("raw"))), tiny, tmp_path / "a")
    comfyui_file(artifact, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        entry = json.loads(file.metadata()["comfyui_bagel"])
        assert "_quantization_metadata" not in file.metadata()
        assert set(file.keys()) == {spec.name for spec in tiny.specs}
        for spec in tiny.specs:
            assert file.get_tensor(spec.name).equal(artifact.decode(spec.name)[spec.name])
    configs = entry.pop("model_configs")
    named = {"format": "comfyui_bagel", "format_version": 1, "variant": "BAGEL-7B-MoT", "dtype": "bf16"}
    assert entry == named | {"quantization": "none"}
    assert configs == {name: tiny.configs[name] for name in ("llm_config.json", "vit_config.json")}


@pytest.mark.loader
def test_any_build_decodes_to_the_same_file(
    tiny: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--bf16: of a lossless build, the checkpoint's own bits; with the key of ComfyUI-BAGEL and no formats."""
    compress(make_plan(tiny, Recipe.load(find_recipe("df11"))), tiny, tmp_path / "a")
    assert main(["comfyui", str(tmp_path / "a"), "--bf16", "--out", str(tmp_path / "m.safetensors")]) == 0
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["comfyui_bagel"])["quantization"] == "none"
        assert "_quantization_metadata" not in file.metadata()
        for spec in tiny.specs:
            assert file.get_tensor(spec.name).equal(tiny.read(spec, 0, spec.numel).reshape(spec.shape))
