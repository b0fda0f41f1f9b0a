"""Adapters: what is merged and by how much, and the sentence for everything that cannot be."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_data import TINY
from safetensors.torch import load_file, save_file

from bagel_compress.errors import CheckpointError
from bagel_compress.source.checkpoint import Checkpoint

Tensors = dict[str, torch.Tensor]
LAYER = "language_model.model.layers.0."
Q, DOWN = f"{LAYER}self_attn.q_proj", f"{LAYER}mlp_moe_gen.down_proj"
EMBED = "language_model.model.embed_tokens"


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def save(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """An adapter of these tensors (names without `base_model.model.`), rank 2 and alpha 4 unless said otherwise."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    stored = {f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    return folder


def lora(module: str = Q, rows: int = 64, columns: int = 64, rank: int = 2) -> Tensors:
    return {
        f"{module}.lora_A.weight": drawn(rank, columns, seed=2), f"{module}.lora_B.weight": drawn(rows, rank, seed=3)
    }  # fmt: skip


def read(folder: Path, name: str) -> torch.Tensor:
    checkpoint = Checkpoint.open(TINY, lora=folder)
    spec = next(s for s in checkpoint.specs if s.name == name)
    return checkpoint.read(spec, 0, spec.numel).reshape(spec.shape)


def plus(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return (base.double() + delta).float().bfloat16()


@pytest.mark.parametrize("part", ["", "language_model.", "language_model.model."])
def test_the_model_that_was_trained_may_be_a_part(tensors: Tensors, tmp_path: Path, part: str) -> None:
    pair = lora()
    folder = save(tmp_path / "lora", {name.removeprefix(part): value for name, value in pair.items()})
    a, b = (value.double() for value in pair.values())
    assert read(folder, f"{Q}.weight").equal(plus(tensors[f"{Q}.weight"], 2 * (b @ a)))


def test_the_vit_alone(tensors: Tensors, tmp_path: Path) -> None:
    module = "vit_model.vision_model.encoder.layers.0.self_attn.q_proj"
    rows, columns = tensors[f"{module}.weight"].shape
    pair = lora(module, rows, columns)
    folder = save(tmp_path / "lora", {n.removeprefix("vit_model."): v for n, v in pair.items()})
    a, b = (value.double() for value in pair.values())
    assert read(folder, f"{module}.weight").equal(plus(tensors[f"{module}.weight"], 2 * (b @ a)))


def test_embeddings_and_biases(tensors: Tensors, tmp_path: Path) -> None:
    """An embedding's delta is turned over; the bias of lora_B is scaled as the pair; a trained bias replaces."""
    vocab = tensors[f"{EMBED}.weight"].shape[0]
    a, b = drawn(2, vocab, seed=4), drawn(64, 2, seed=5)
    bias, trained = drawn(64, seed=6), drawn(64, seed=7)
    extra = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b, f"{Q}.lora_B.bias": bias}
    folder = save(tmp_path / "lora", lora() | extra | {"connector.fc1.bias": trained}, bias="all", lora_bias=True)
    delta = 2 * (b.double() @ a.double()).T
    assert read(folder, f"{EMBED}.weight").equal(plus(tensors[f"{EMBED}.weight"], delta))
    assert read(folder, f"{Q}.bias").equal(plus(tensors[f"{Q}.bias"], 2 * bias.double()))
    assert read(folder, "connector.fc1.bias").equal(trained.bfloat16())


def test_a_trained_bias_of_an_adapted_module_takes_the_adapters_bias_too(tensors: Tensors, tmp_path: Path) -> None:
    trained, bias = drawn(64, seed=7), drawn(64, seed=6)
    extra = {f"{Q}.base_layer.bias": trained, f"{Q}.lora_B.bias": bias}
    folder = save(tmp_path / "lora", lora() | extra, bias="all", lora_bias=True, use_rslora=True)
    assert read(folder, f"{Q}.bias").equal(plus(trained, 4 / 2**0.5 * bias.double()))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"alpha_pattern": {"k_proj": 100, "q_proj": 8, "self_attn.*": 50}}, 4.0),  # the first that matches
        ({"alpha_pattern": {"^.*layers.0.*": 6}}, 3.0),
        ({"alpha_pattern": {"proj": 6}}, 2.0),  # whole names alone
        ({"alpha_pattern": {r"((\w+\.?)+)+!": 3}}, 2.0),  # holds `re` for longer than anybody waits
        ({"r": 16, "rank_pattern": {"q_proj": 2}, "lora_alpha": 3}, 1.5),
        ({"r": 16, "rank_pattern": {"q_proj": 2}, "lora_alpha": 3, "use_rslora": True}, 3 / 2**0.5),
        ({"r": 2, "lora_alpha": 0.5}, 0.25),
        ({"target_modules": "all-linear", "layers_to_transform": None, "bias": "lora_only"}, 2.0),
        ({"target_modules": r".*\.(q|k)_proj", "lora_dropout": 0.5, "init_lora_weights": "gaussian"}, 2.0),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7], "layers_pattern": "layers"}, 2.0),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_proj"], "modules_to_save": ["llm2vae"]}, 2.0),
        ({"future_switch": False, "megatron_config": None, "layer_replication": [], "eva_config": {"rho": 2.0}}, 2.0),
    ],
)
def test_scales(tensors: Tensors, tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    pair = lora()
    a, b = (value.double() for value in pair.values())
    folder = save(tmp_path / "lora", pair, **config)
    assert read(folder, f"{Q}.weight").equal(plus(tensors[f"{Q}.weight"], (b * scale) @ a))
    adapter = Checkpoint.open(TINY, lora=folder).adapter
    assert adapter is not None
    assert adapter.scales == pytest.approx((scale, scale))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        *(({"init_lora_weights": init}, f"init_lora_weights to '{init}'")
          for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard-of")),
        *(({key: value}, f"sets {key}, which cannot be merged") for key, value in {
            "use_dora": True, "use_qalora": True, "layer_replication": [[0, 2]], "trainable_token_indices": [5],
            "target_parameters": ["weight"], "alora_invocation_tokens": [1], "kasa_config": {"beta": 1},
            "use_bdlora": {"nblocks": 2}, "megatron_config": {"a": 1}, "ensure_weight_tying": True, "future_switch": 1,
        }.items()),
        *(({"lora_alpha": value}, "lora_alpha is") for value in (float("nan"), float("inf"), 1e300, True, "16", [4])),
        *(({"r": value}, "r is") for value in (0, -2, True, 2.0, "2", float("nan"))),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj' is 0"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern 'q_proj' is nan"),
        ({"rank_pattern": [1]}, "rank_pattern is a list"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern or alpha_pattern is no regular expression"),
        ({"alpha_pattern": {"(){1000000000}q_proj": 3}}, "takes too long to match"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"target_modules": ["k_proj"]}, "which target_modules of adapter_config.json does not name"),
        ({"target_modules": ".*k_proj"}, "which target_modules of adapter_config.json does not name"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, "target_modules of adapter_config.json does not"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "target_modules of adapter_config.json does"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, "target_modules of adapter_config.json"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
        ({"lora_alpha": 0}, "changes no weight"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(TINY, lora=save(tmp_path / "lora", lora(), **config))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - begun < 2


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({A: torch.full((2, 64), float("nan"))}, "values that are not finite"),
        ({B: torch.full((64, 2), float("inf"))}, "values that are not finite"),
        ({A: torch.full((2, 64), 1e30), B: torch.full((64, 2), 1e30)}, "beyond what bf16 holds"),
        ({B: torch.zeros(64, 2)}, "changes no weight"),
        ({A: torch.zeros(2, 64)}, "changes no weight"),
        ({A: torch.tensor([[1.0] * 64, [0.0] * 64]), B: torch.tensor([[0.0, 1.0]] * 64)}, "changes no weight"),
        ({f"{Q}.lora_A.other.weight": drawn(2, 64)}, "twice"),
        ({f"{Q}.lora_magnitude_vector": drawn(64)}, "lora_magnitude_vector, which this checkpoint does not have"),
        ({f"{Q}.lora_A.bias": drawn(64)}, "lora_A.bias, which this checkpoint does not have"),
        ({f"{Q}.lora_diag": drawn(2)}, "lora_diag, which this checkpoint does not have"),
        ({f"{EMBED}.token_adapter.trainable_tokens_delta": drawn(2, 64)}, "trainable_tokens_delta, which this"),
        ({"norm.weight": drawn(64)}, "norm.weight, which this checkpoint does not have"),
        ({A: None}, "has only lora_B for"),
        ({B: None}, "has only lora_A for"),
        ({A: torch.zeros(2, 64, dtype=torch.int32)}, "is I32, expected BF16, F16 or F32"),
        ({"llm2vae.bias": torch.zeros(64, dtype=torch.int32)}, "is I32, expected BF16, F16 or F32"),
        ({"llm2vae.bias": drawn(64), "llm2vae.original_module.bias": drawn(64)}, "original_module with other values"),
        ({"llm2vae.modules_to_save.bias": drawn(64)}, "modules_to_save with other values"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, change: dict[str, torch.Tensor | None], says: str) -> None:
    stored = {name: value for name, value in (lora() | change).items() if value is not None}
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(TINY, lora=save(tmp_path / "lora", stored))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_tensor_that_is_the_bases_changes_nothing(tensors: Tensors, tmp_path: Path) -> None:
    folder = save(tmp_path / "lora", {"llm2vae.weight": tensors["llm2vae.weight"].float()})
    with pytest.raises(CheckpointError, match="changes no weight"):
        Checkpoint.open(TINY, lora=folder)


def test_an_adapter_has_a_name_and_a_digest(tmp_path: Path) -> None:
    one = Checkpoint.open(TINY, lora=save(tmp_path / "mine", lora())).adapter
    snapshot = tmp_path / "models--someone--a--lora" / "snapshots"
    snapshot.mkdir(parents=True)
    same = Checkpoint.open(TINY, lora=save(snapshot / ("a" * 40), lora())).adapter
    other = Checkpoint.open(TINY, lora=save(tmp_path / "other", lora(), lora_alpha=5)).adapter
    assert one is not None
    assert same is not None
    assert other is not None
    assert (one.name, same.name) == ("mine", "someone/a--lora")
    assert one.digest == same.digest != other.digest


def test_files_that_are_no_adapter(tmp_path: Path) -> None:
    folder = save(tmp_path / "lora", lora())
    for content in ("[1]", "{", "{" * 100_000, '{"r": 1' + "0" * 5000 + "}"):
        (folder / "adapter_config.json").write_text(content)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(TINY, lora=folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    load_file(folder / "adapter_model.safetensors")
