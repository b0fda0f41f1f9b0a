"""What a checkpoint must be, and the sentence for everything it must not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_data import TINY, Write
from safetensors.torch import save_file

from bagel_compress.errors import CheckpointError, HubError
from bagel_compress.io import bf16
from bagel_compress.source.checkpoint import Checkpoint, normal_name


def test_reads_what_the_library_reads(tiny: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert [s.name for s in tiny.specs] == sorted(tensors)
    for spec in tiny.specs:
        assert tiny.read(spec, 0, spec.numel).equal(tensors[spec.name].reshape(-1))
        assert tiny.read(spec, 3, 7).equal(tensors[spec.name].reshape(-1)[3:7])


def test_rounding_is_torchs() -> None:
    bits = np.random.default_rng(1).integers(0, 1 << 32, 700_001, dtype=np.uint32)
    bits[:6] = (0x3F808000, 0x3F818000, 0x3F7FFFFF, 0x7F7FFFFF, 0xFF800000, 0x00000001)
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    found = bf16.as_tensor(bf16.rounded(values))
    assert found.isnan().equal(expected.isnan())
    assert found.nan_to_num(0.5).equal(expected.nan_to_num(0.5))


@pytest.mark.parametrize(
    ("stored", "official"),
    [
        ("llm2vae.bias", "llm2vae.bias"),
        ("model.llm2vae.bias", "llm2vae.bias"),
        ("module.model.llm2vae.bias", "llm2vae.bias"),
        ("_fsdp_wrapped_module.llm2vae.bias", "llm2vae.bias"),
        (
            "module._fsdp_wrapped_module.language_model.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module"
            ".self_attn.q_proj.weight",
            "language_model.model.layers.0.self_attn.q_proj.weight",
        ),
        ("language_model.model.norm.weight", "language_model.model.norm.weight"),
        ("model.language_model.lm_head.weight", "language_model.lm_head.weight"),
        ("optimizer.state.0", None),
        ("encoder.conv_in.weight", None),
    ],
)
def test_names(stored: str, official: str | None) -> None:
    assert normal_name(stored) == official


def _missing(t: dict[str, torch.Tensor]) -> None:
    del t["language_model.model.layers.1.mlp.up_proj.weight"]


def _extra(t: dict[str, torch.Tensor]) -> None:
    t["language_model.model.layers.3.mlp.up_proj.weight"] = t[
        "language_model.model.layers.1.mlp.up_proj.weight"
    ].clone()


def _foreign(t: dict[str, torch.Tensor]) -> None:
    t["something.else"] = torch.zeros(2)


def _misshapen(t: dict[str, torch.Tensor]) -> None:
    t["llm2vae.weight"] = t["llm2vae.weight"][:-1].clone()


def _integers(t: dict[str, torch.Tensor]) -> None:
    t["llm2vae.weight"] = torch.zeros(64, 64, dtype=torch.int8)


def _twice(t: dict[str, torch.Tensor]) -> None:
    t["module.llm2vae.weight"] = t["llm2vae.weight"].clone()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_missing, r"lacks language_model.model.layers.1.mlp.up_proj.weight"),
        (_extra, r"has language_model.model.layers.3.mlp.up_proj.weight, more than its configs say"),
        (_foreign, r"something.else, which is no tensor of BAGEL"),
        (_misshapen, r"llm2vae.weight has shape \[63, 64\], the configs say \[64, 64\]"),
        (_integers, r"llm2vae.weight is I8, expected BF16, F16 or F32"),
        (_twice, r"holds llm2vae.weight twice"),
    ],
)
def test_wrong_tensors(
    write: Write, tensors: dict[str, torch.Tensor], change: Callable[[dict[str, torch.Tensor]], None], says: str
) -> None:
    changed = dict(tensors)
    change(changed)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(write(changed))


def test_truncated_and_foreign_weights(write: Write, tensors: dict[str, torch.Tensor]) -> None:
    folder = write(tensors)
    weights = folder / "ema.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(folder)
    weights.write_bytes(b"PK\x03\x04 this is a zip file, such as torch.save writes" * 10)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint.open(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        Checkpoint.open(folder)


def test_missing_configs_and_vae(write: Write, tensors: dict[str, torch.Tensor]) -> None:
    for i, name in enumerate(("llm_config.json", "vit_config.json", "ae.safetensors")):
        folder = write(tensors, f"v{i}")
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"no {name}"):
            Checkpoint.open(folder)
        assert Checkpoint.open(folder, base=TINY).digest == Checkpoint.open(TINY).digest


def test_broken_configs(write: Write, tensors: dict[str, torch.Tensor]) -> None:
    folder = write(tensors)
    (folder / "llm_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"llm_config\.json is not readable JSON"):
        Checkpoint.open(folder)
    (folder / "llm_config.json").write_text(json.dumps({"hidden_size": "64"}))
    with pytest.raises(CheckpointError, match="expected a positive integer"):
        Checkpoint.open(folder)


def test_the_vae_must_be_one(write: Write, tensors: dict[str, torch.Tensor]) -> None:
    folder = write(tensors)
    save_file({"a": torch.zeros(2)}, folder / "ae.safetensors")
    with pytest.raises(CheckpointError, match="not BAGEL's VAE"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("target", ["../ema.safetensors", "/etc/passwd", "a\\..\\b", "C:x", "sub/../../x"])
def test_an_index_that_points_outside(write: Write, tensors: dict[str, torch.Tensor], target: str) -> None:
    folder = write(tensors)
    (folder / "ema.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"llm2vae.bias": target}}))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        Checkpoint.open(folder)


def test_indexes_that_do_not_fit(write: Write, tensors: dict[str, torch.Tensor]) -> None:
    folder = write(tensors, file="model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"llm2vae.bias": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="copy the missing shard"):
        Checkpoint.open(folder)
    index.write_text(json.dumps({"weight_map": {"not.there": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"holds not\.there, but it does not"):
        Checkpoint.open(folder)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint.open(folder)


def test_a_source_that_changes_is_an_error(write: Write, tensors: dict[str, torch.Tensor]) -> None:
    folder = write(tensors)
    checkpoint = Checkpoint.open(folder)
    checkpoint.read(checkpoint.specs[0], 0, 4)
    os.utime(folder / "ema.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        checkpoint.read(checkpoint.specs[0], 0, 4)


def test_the_digest_is_of_the_weights(write: Write, tensors: dict[str, torch.Tensor], tiny: Checkpoint) -> None:
    other = dict(tensors)
    other["llm2vae.bias"] = other["llm2vae.bias"].clone()
    other["llm2vae.bias"][5] += 1
    assert Checkpoint.open(write(other)).digest != tiny.digest
    assert Checkpoint.open(write(tensors, "same")).digest == tiny.digest


def test_what_does_not_exist() -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open("no-such-folder")
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open("./no/such")


def test_without_network_a_repository_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="the Hub cannot be reached") as caught:
        Checkpoint.open("some-owner/some-model")
    assert "download it elsewhere and give its folder" in str(caught.value)
