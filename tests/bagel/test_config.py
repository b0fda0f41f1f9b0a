"""The one reader of a model's configs: right sizes, and one sentence that names file and key for a wrong value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from bagel.config import LATENT_INPUT, BagelConfig, _latent_patch
from bagel.errors import BagelError
from bagel.layout import expected_tensors
from bagel.text import _slow_ids
from bagel_compress.io.packaged import FULL_CONFIGS
from bagel_compress.source.released_header import full_sizes

FILES = ("llm_config.json", "vit_config.json", "config.json")


@pytest.fixture
def raw(tiny: Path) -> dict[str, Any]:
    return {name: json.loads((tiny / name).read_text(encoding="utf-8")) for name in FILES}


def read(raw: dict[str, Any], shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})) -> BagelConfig:
    return BagelConfig.from_mappings(*(raw[name] for name in FILES), shapes)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("llm_config.json", "hidden_size", None),
        ("llm_config.json", "num_hidden_layers", True),
        ("llm_config.json", "num_key_value_heads", None),
        ("llm_config.json", "rms_norm_eps", "1e-6"),
        ("llm_config.json", "rope_theta", float("nan")),
        ("llm_config.json", "rope_theta", -1.0),
        ("vit_config.json", "patch_size", 14.0),
        ("vit_config.json", "num_hidden_layers", 0),
        ("config.json", "interpolate_pos", 1),
        ("config.json", "timestep_shift", None),
        ("config.json", "vae_transform", [1024, 512, 16]),
        ("config.json", "vit_transform.max_image_size", None),
        ("config.json", "max_latent_size", "64"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(raw: dict[str, Any], file: str, key: str, value: object) -> None:
    outer, _, inner = key.partition(".")
    raw[file][outer] = raw[file][outer] | {inner: value} if inner else value
    with pytest.raises(BagelError, match=f"^{re.escape(f'{file}: {key} is {value!r}, expected ')}"):
        read(raw)


def test_vit_depth_by_weights(raw: dict[str, Any]) -> None:
    """The last configured block counts only where it is stored; a hole does not make the model shallower."""
    depth = raw["vit_config.json"]["num_hidden_layers"]
    sizes = read(raw).sizes
    assert sizes.vit_layers == depth - 1
    shapes = expected_tensors(sizes)
    assert read(raw, shapes).sizes == sizes
    layer = f"vit_model.vision_model.encoder.layers.{depth - 1}.layer_norm1.bias"
    assert read(raw, {**shapes, layer: (64,)}).vit.num_layers == depth
    last = f"vit_model.vision_model.encoder.layers.{depth - 2}."
    without = {name: shape for name, shape in shapes.items() if not name.startswith(last)}
    assert read(raw, without).vit.num_layers == depth - 1


def test_released_sizes_with_and_without_shapes() -> None:
    sizes = full_sizes()
    assert (sizes.layers, sizes.vit_layers, sizes.latent, sizes.latent_rows, sizes.vit_rows) == (28, 26, 64, 4096, 4900)
    assert full_sizes(3).layers == 3
    assert BagelConfig.from_dir(FULL_CONFIGS, expected_tensors(sizes), 16, 8).sizes == sizes


def test_keys_have_as_many_rows_as_values() -> None:
    shapes = expected_tensors(full_sizes(1))
    for suffix in ("", "_moe_gen"):
        name = "language_model.model.layers.0.self_attn.{}_proj" + suffix + ".weight"
        assert shapes[name.format("k")] == shapes[name.format("v")] == (512, 3584)
        assert shapes[name.format("q")] == (3584, 3584)


def test_ids_of_wrappers_come_from_both_files(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.json"
    vocab.write_text(json.dumps({"a": 0, "<|im_end|>": 1}))
    assert _slow_ids(vocab, {"<|im_start|>": 2}) == [2, 1, 3, 4]


def test_a_latent_of_one_channel_has_patches_too() -> None:
    assert _latent_patch({LATENT_INPUT: (8, 4)}, 1) == 2
