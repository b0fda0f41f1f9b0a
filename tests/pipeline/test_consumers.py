"""Whoever reads a build compares what it reads, and whatever can be built can be opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_data import NF4, TINY, Write
from safetensors.torch import save_file
from test_artifact import SHARD, flip

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.comfyui_file import comfyui_file
from bagel_compress.build.compress import compress
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import ArtifactError, BagelCompressError
from bagel_compress.exporting.source import WeightSource
from bagel_compress.io.safetensors_file import TensorFile
from bagel_compress.run.load import open_model
from bagel_compress.source.checkpoint import Checkpoint

EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny: Checkpoint) -> Path:
    out = tmp_path_factory.mktemp("consumed") / "a"
    compress(make_plan(tiny, Recipe.parse(NF4, "x")), tiny, out)
    return out


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.mark.parametrize("name", [SHARD, "llm_config.json", "tokenizer.json", "ae.safetensors"])
def test_a_flipped_byte_is_not_run(folder: Path, name: str) -> None:
    flip(folder / name, -2)
    with pytest.raises(ArtifactError, match="not what the manifest says"):
        open_model(folder)


def test_a_flipped_byte_goes_into_no_other_form(folder: Path, tmp_path: Path) -> None:
    tensor = TensorFile.open(folder / SHARD).tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    flip(folder / SHARD, tensor.start)
    source = WeightSource.open(folder)
    with pytest.raises(ArtifactError, match=r"up_proj\.weight is not what the manifest says"):
        source.tensor("layers.1.und.up_proj.weight")
    with pytest.raises(ArtifactError, match=r"up_proj\.weight is not what the manifest says"):
        source.encoded("layers.1.und.up_proj.weight")
    fp8 = tmp_path / "fp8"
    checkpoint = Checkpoint.open(TINY)
    compress(make_plan(checkpoint, Recipe.load("fp8-comfyui")), checkpoint, fp8)
    flip(fp8 / SHARD, -2)
    with pytest.raises(ArtifactError, match="not what the manifest says"):
        comfyui_file(Artifact.open(fp8), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_tensor_of_another_shape_is_not_the_manifests(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_bytes())
    unit = data["units"]["llm2vae.bias"]
    unit["parts"]["llm2vae.bias"]["shape"] = [1, *unit["parts"]["llm2vae.bias"]["shape"]]
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"does not hold llm2vae\.bias as the manifest says"):
        Artifact.open(folder).parts("llm2vae.bias")


def test_a_file_that_the_manifest_does_not_list_is_not_opened(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_bytes())
    del data["files"]["vocab.json"]
    (folder / MANIFEST).write_text(json.dumps(data))
    (folder / "vocab.json").write_text("{,")
    open_model(folder)
    assert "vocab.json" not in WeightSource.open(folder).files


def _config(name: str, changes: dict[str, Any]) -> Callable[[Path, Tensors], object]:
    def change(folder: Path, tensors: Tensors) -> object:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        return (folder / name).write_text(json.dumps(data | changes), encoding="utf-8")

    return change


def _saved(changes: Callable[[Tensors], Tensors]) -> Callable[[Path, Tensors], object]:
    def change(folder: Path, tensors: Tensors) -> object:
        kept = {name: value.clone() for name, value in changes(tensors).items()}
        return save_file({**tensors, **kept}, folder / "ema.safetensors", {"format": "pt"})

    return change


def _small_vocabulary(folder: Path, tensors: Tensors) -> None:
    _saved(lambda t: {name: t[name][:560] for name in (EMBED, HEAD)})(folder, tensors)
    _config("llm_config.json", {"vocab_size": 560})(folder, tensors)


def _folder_for_config(folder: Path, tensors: Tensors) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def _tokenizer(**changes: object) -> Callable[[Path, Tensors], object]:
    def change(folder: Path, tensors: Tensors) -> None:
        path = folder / "tokenizer.json"
        whole = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(whole | {"model": whole["model"] | changes}), encoding="utf-8")

    return change


SOURCES: dict[str, Callable[[Path, Tensors], object]] = {
    "a small vocabulary": _small_vocabulary,
    "a latent table of 50 rows": _saved(lambda t: {"latent_pos_embed.pos_embed": t["latent_pos_embed.pos_embed"][:50]}),
    "an empty tokenizer": lambda folder, _: (folder / "tokenizer.json").write_text("{}"),
    "a tokenizer that is a list": lambda folder, _: (folder / "tokenizer.json").write_text("[]"),
    "a tokenizer that the library panics at": _tokenizer(continuing_subword_prefix="##"),
    "a damaged tokenizer_config": lambda folder, _: (folder / "tokenizer_config.json").write_text("{,"),
    "a vae_transform without stride": _config("config.json", {"vae_transform": {"max_image_size": 128}}),
    "null sections": _config("config.json", {"vae_config": None, "vit_transform": None, "vae_transform": None}),
    "a section that is a list": _config("config.json", {"vae_config": [1]}),
    "an eps that is null": _config("llm_config.json", {"rms_norm_eps": None}),
    "an eps that is text": _config("llm_config.json", {"rms_norm_eps": "small"}),
    "a theta that is infinite": _config("llm_config.json", {"rope_theta": 1e999}),
    "a count that is a list": _config("llm_config.json", {"num_hidden_layers": [2]}),
    "a count beyond all tensors": _config("llm_config.json", {"num_hidden_layers": 10**9}),
    "a count of 5,000 digits": lambda folder, _: (folder / "llm_config.json").write_text(
        '{"num_hidden_layers": ' + "9" * 5000 + "}"
    ),
    "a config that is a folder": _folder_for_config,
    "heads that do not divide": _config("llm_config.json", {"num_attention_heads": 3}),
    "a patch size of zero": _config("vit_config.json", {"patch_size": 0}),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_what_can_be_built_can_be_opened(kind: str, write: Write, tensors: Tensors, tmp_path: Path) -> None:
    """Each of these built and could not be run."""
    folder = write(tensors)
    SOURCES[kind](folder, tensors)
    try:
        checkpoint = Checkpoint.open(folder)
        plan = make_plan(checkpoint, Recipe.parse(NF4, "x"))
        compress(plan, checkpoint, tmp_path / "a")
    except BagelCompressError:
        return
    image = open_model(tmp_path / "a").run(["a red cat"], size=(32, 32), seed=1).image
    assert image.size == (32, 32)
