"""Synthetic checkpoints: complete, deterministic, and like trained weights to a codec."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_data import TINY, folder_bytes
from safetensors.torch import load_file

from bagel_compress.cli import main
from bagel_compress.errors import CheckpointError
from bagel_compress.io.packaged import SMALL_CONFIGS
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

    shapes = synthetic.vae_shapes(VAEConfig())
    assert len(shapes) == 244
    assert sum(int(np.prod(s)) for s in shapes.values()) == 83_819_683


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="not empty"):
        synthetic.synthesise("tiny", tmp_path, 0)
    with pytest.raises(CheckpointError, match="at least 1 decoder layer"):
        synthetic.synthesise("tiny", tmp_path / "b", 0, layers=0)


def test_every_reader_of_its_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from bagel.text import WRAPPERS, TextCodec

    synthetic.synthesise("tiny", tmp_path / "a", 0)
    golden = [561, 562, 569, 570]  # of the tokenizer that the checkpoint's traces were recorded with
    fast = TextCodec.from_dir(tmp_path / "a")
    assert [fast.bos, fast.eos, fast.image_start, fast.image_end] == golden
    plain = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert [plain.token_to_id(token) for token in WRAPPERS] == golden
    assert plain.id_to_token(574) == "pad574"
    assert plain.get_vocab_size() == 608  # every row of the embedding has a token
    (tmp_path / "a" / "tokenizer.json").unlink()
    slow = TextCodec.from_dir(tmp_path / "a")
    assert [slow.bos, slow.eos, slow.image_start, slow.image_end] == golden
    assert slow.encode("a red cat<|im_end|>") == fast.encode("a red cat<|im_end|>")


def test_the_tokenizer_of_transformers_gives_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from bagel.text import WRAPPERS

    synthetic.synthesise("tiny", tmp_path / "a", 0)
    for remove in ((), ("tokenizer.json",)):
        for name in remove:
            (tmp_path / "a" / name).unlink()
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(str(tmp_path / "a"))
        assert tokenizer.convert_tokens_to_ids(list(WRAPPERS)) == [561, 562, 569, 570]


def test_a_checkpoint_whose_tokenizer_files_disagree_is_refused(tmp_path: Path) -> None:
    """Padding words after a gap: one reader appends the wrapper tokens, the other takes the ids of the config."""
    import json

    from bagel.errors import BagelError
    from bagel.sampler import Sampler

    synthetic.synthesise("tiny", tmp_path / "a", 0)
    path = tmp_path / "a" / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    for token in data["added_tokens"]:
        del data["model"]["vocab"][token["content"]]
    path.write_text(json.dumps(data), "utf-8")
    with pytest.raises(CheckpointError, match=r"disagree on the ids .*\[595, 596, 603, 604\] .*\[561, 562, 569, 570\]"):
        Checkpoint.open(tmp_path / "a")
    with pytest.raises(BagelError, match="disagree on the ids"):
        Sampler.from_dir(tmp_path / "a")


def test_a_tokenizer_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    import json

    synthetic.synthesise("tiny", tmp_path / "a", 0)
    for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json"):
        path = tmp_path / "a" / name
        data = json.loads(path.read_text("utf-8"))
        words = data.get("model", {}).get("vocab", data)
        words.pop("<|vision_end|>", None)
        if "added_tokens_decoder" in data:
            data["added_tokens_decoder"].pop("570")
        if "added_tokens" in data:
            data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] != 570]
        words.update({} if "added_tokens_decoder" in data else {"beyond": 570})
        path.write_text(json.dumps(data), "utf-8")
    with pytest.raises(CheckpointError, match=r"<\|vision_end\|> the id 608, the embedding has 608 rows"):
        Checkpoint.open(tmp_path / "a")


def test_the_small_shape_is_that_of_the_checkpoint_of_the_tests(tmp_path: Path) -> None:
    for file in SMALL_CONFIGS.iterdir():
        assert file.read_bytes() == (TINY / file.name).read_bytes()
    synthetic.synthesise("tiny", tmp_path, 0)
    for name in ("ae.safetensors", "ema.safetensors"):
        made, golden = ({k: t.shape for k, t in load_file(folder / name).items()} for folder in (tmp_path, TINY))
        assert made == golden
