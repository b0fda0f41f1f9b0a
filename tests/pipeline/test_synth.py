"""Synthetic checkpoints: complete, deterministic, and like trained weights to a codec."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_data import folder_bytes
from safetensors.torch import load_file

from bagel_compress.cli import main
from bagel_compress.errors import CheckpointError
from bagel_compress.source import synthetic
from bagel_compress.source.checkpoint import Checkpoint


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["synth", "tiny", "--out", str(tmp_path / "a"), "--seed", "7"]) == 0
    monkeypatch.setattr(synthetic, "CHUNK", 1000)
    synthetic.synthesise("tiny", tmp_path / "b", 7)
    synthetic.synthesise("tiny", tmp_path / "c", 8)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert Checkpoint.open(tmp_path / "a").digest != Checkpoint.open(tmp_path / "c").digest


def test_it_is_a_checkpoint_of_the_asked_shape(tmp_path: Path) -> None:
    synthetic.synthesise("tiny", tmp_path / "a", 0, layers=5)
    checkpoint = Checkpoint.open(tmp_path / "a")
    assert checkpoint.configs["llm_config.json"]["num_hidden_layers"] == 5
    assert sum("layers.4." in spec.name and "language" in spec.name for spec in checkpoint.specs) == 28
    assert not list((tmp_path / "a").glob("*.partial"))


def test_the_medium_shape_is_a_whole_model(tmp_path: Path) -> None:
    from bagel.sampler import FlowSettings, Sampler

    synthetic.synthesise("medium", tmp_path / "a", 0, layers=1)
    sampler = Sampler.from_dir(tmp_path / "a")
    llm = sampler.bagel.config.llm
    assert (llm.hidden_size, llm.num_layers, llm.head_dim) == (1024, 1, 128)
    flow = FlowSettings(num_timesteps=2, cfg_text_scale=1.0)
    image = sampler.run(["a cat"], size=(32, 48), flow=flow).image
    assert image is not None
    assert image.size == (48, 32)


def test_values_look_trained(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    synthetic.synthesise("tiny", tmp_path / "a", 0, layers=24)
    made = load_file(tmp_path / "a" / "ema.safetensors")
    for name in ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"):
        assert made[name].equal(tensors[name])  # the golden tables were recorded from the official class
    weights = torch.cat([t.reshape(-1) for n, t in made.items() if n.endswith("_proj.weight") and "language" in n])
    exponents = (weights.view(torch.int16).numpy().view(np.uint16) >> 7) & 255
    share = np.bincount(exponents, minlength=256) / exponents.size
    entropy = -sum(p * np.log2(p) for p in share if p > 0)
    assert 2.5 < entropy < 2.9  # released weights: 2.61 to 2.83 bits coded (DF11 release)
    norms = torch.cat([t for n, t in made.items() if n.endswith("layernorm.weight")]).float()
    assert abs(norms.mean() - 1) < 0.02
    assert all(t.isfinite().all() for t in made.values())


def test_the_full_shape_has_the_released_vae() -> None:
    from bagel.vae import VAEConfig

    shapes = synthetic._vae_shapes(VAEConfig())
    assert len(shapes) == 244
    assert sum(int(np.prod(s)) for s in shapes.values()) == 83_819_683


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="not empty"):
        synthetic.synthesise("tiny", tmp_path, 0)
    with pytest.raises(CheckpointError, match="at least 1 decoder layer"):
        synthetic.synthesise("tiny", tmp_path / "b", 0, layers=0)
