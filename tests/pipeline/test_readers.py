"""What other loaders find in an artifact's config.json and index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pipeline_data import TINY

from bagel_compress.build.compress import compress
from bagel_compress.build.loader_configs import MIXED_METHOD, config_json, index_json
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.source.checkpoint import Checkpoint

RULES = "name: x\nrules: [{match: {component: llm, expert: %s, kind: linear}, codec: %s}, {match: {}, codec: raw}]"


def config_of(tiny: Checkpoint, *texts: str) -> dict[str, Any]:
    plan = make_plan(tiny, Recipe.parse("\n".join(texts), "x"))
    data: dict[str, Any] = json.loads(config_json(tiny.configs, [(p.unit, p.codec) for p in plan.placements]))
    return data


@pytest.mark.parametrize(
    ("codec", "method"), [("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), ("fp8", "compressed-tensors")]
)
def test_one_format_names_its_own_loader(tiny: Checkpoint, codec: str, method: str) -> None:
    config = config_of(tiny, RULES % ("und", codec))
    entry = config["quantization_config"]
    assert entry["quant_method"] == method
    plain = entry["ignore"] if method == "compressed-tensors" else entry["llm_int8_skip_modules"]
    assert "language_model.lm_head" in plain
    assert "language_model.model.layers.0.self_attn.q_proj_moe_gen" in plain
    assert "vit_model.vision_model.encoder.layers.0.mlp.fc1" in plain
    assert "language_model.model.layers.0.self_attn.q_proj" not in plain
    assert not any("norm" in name or "embed_tokens" in name for name in plain)  # not linear


def test_raw_artifacts_have_no_entry_and_keep_the_source_config(tiny: Checkpoint) -> None:
    config = config_of(tiny, RULES % ("und", "raw"))
    source = json.loads((TINY / "config.json").read_text())
    assert config == source
    assert config["vae_config"]["ch"] == 32


def test_without_a_source_config_there_is_a_minimal_one(tiny: Checkpoint) -> None:
    configs = {name: tiny.configs[name] for name in ("llm_config.json", "vit_config.json")}
    config = json.loads(config_json(configs, []))
    assert config["architectures"] == ["BagelForConditionalGeneration"]
    assert config["llm_config"]["hidden_size"] == 64


def test_old_entries_of_the_source_go(tiny: Checkpoint) -> None:
    configs = {**tiny.configs, "config.json": {"quantization_config": {"quant_method": "gptq"}, "dfloat11_config": {}}}
    config = json.loads(config_json(configs, []))
    assert not {"quantization_config", "dfloat11_config"} & config.keys()


def test_mixed_formats_are_refused_by_every_loader_but_ours(tiny: Checkpoint) -> None:
    rules = (
        "name: x\nrules: [{match: {component: llm, expert: und, kind: linear}, codec: nf4},"
        " {match: {component: llm, expert: gen, kind: linear}, codec: fp8}, {match: {}, codec: raw}]"
    )
    entry = config_of(tiny, rules)["quantization_config"]
    assert entry["quant_method"] == MIXED_METHOD
    assert entry["formats"].keys() == {"nf4", "fp8"}


def test_the_index_lists_every_stored_tensor() -> None:
    index = json.loads(index_json({"b": "2", "a": "1"}, 7))
    assert index == {"metadata": {"total_size": 7}, "weight_map": {"a": "1", "b": "2"}}


def test_the_vae_lies_apart_where_a_reader_scans_the_folder(tiny: Checkpoint, nf4: Recipe, tmp_path: Path) -> None:
    text = "name: d\nrules: [{match: {component: llm, kind: linear}, codec: df11}, {match: {}, codec: raw}]"
    lossless = compress(make_plan(tiny, Recipe.parse(text, "d")), tiny, tmp_path / "d")
    assert lossless.vae_path == tmp_path / "d" / "vae" / "ae.safetensors"
    assert lossless.verify() == []
    assert "dfloat11_config" in json.loads((tmp_path / "d" / "config.json").read_text())
    quantised = compress(make_plan(tiny, nf4), tiny, tmp_path / "n")
    assert quantised.vae_path == tmp_path / "n" / "ae.safetensors"
    for spec in tiny.specs:
        unit = lossless.manifest.unit_of[spec.name]
        assert lossless.decode(unit)[spec.name].reshape(-1).equal(tiny.read(spec, 0, spec.numel))
