"""Recipes that name an export target, end to end: compress, judge, export, judge what was exported, say what ran."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.io.packaged import resource

Cli = Callable[..., tuple[int, str, str]]
NANO = resource("BAGEL-nano")
CASES = ("draw_two", "ask_describe")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bagel_compress.run.case import load_cases
    from bagel_compress.validation.artifact import record_source

    cases = load_cases([resource("exports") / "cases" / "nano" / f"{name}.yaml" for name in CASES])
    return record_source(NANO, cases, tmp_path_factory.mktemp("trace") / "t.safetensors").path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "target", "forms", "ran"),
    [
        ("onnx-fp16", "ort-cuda-24gb", {"dense"}, "fp16"),
        ("onnx-int8", "ort-cpu", {"qdq"}, "fp32"),
        ("trt-rtx-fp8-24gb", "trt-rtx4090-24gb", {"qdq"}, "fp32"),
        ("trt-rtx-int4-12gb", "trt-rtx3060-12gb", {"int4"}, "fp32"),
    ],
)
def test_a_recipe_goes_all_the_way(
    recipe: str, target: str, forms: set[str], ran: str, trace: Path, tmp_path: Path, cli: Cli
) -> None:
    if recipe.startswith("trt"):
        pytest.importorskip("tensorrt_rtx")
    out = tmp_path / recipe
    code, text, err = cli("run", recipe, "--source", NANO, "--out", out, "--trace", trace)
    assert code == 0, text + err
    folder = ExportFolder.open(tmp_path / f"{recipe}-{target}")
    assert set(folder.manifest.blocks["gen_layer_00"].forms) == forms
    assert folder.manifest.source.recipe is not None
    assert folder.manifest.source.recipe.name == recipe
    assert folder.verify() == []
    assert f"on cpu in {ran}: passed" in text
    engines = [entry.engine for entry in folder.manifest.blocks.values() if entry.engine]
    assert len(engines) == (len(folder.manifest.blocks) if recipe.startswith("trt") else 0)
    assert ("engines were built; running them needs the card" in text) == bool(engines)
    report = json.loads((folder.path / "reports" / "parity.json").read_text())
    assert report["artifact"] == folder.digest
    assert (report["environment"]["runtime"], report["environment"]["provider"]) == ("onnxruntime", "cpu")
    again = cli("run", recipe, "--source", NANO, "--out", out, "--trace", trace)
    assert again[0] == 0
    assert ExportFolder.open(folder.path).digest == folder.digest  # kept, not built again


def test_every_model_has_cases_that_fit(tiny: Path) -> None:
    from bagel_compress.cli.demo import demo_cases, largest_side
    from bagel_compress.run.case import load_cases
    from bagel_compress.source.checkpoint import Checkpoint

    for source in (tiny, NANO):
        checkpoint = Checkpoint.open(source)
        sides = [side for case, _ in load_cases([demo_cases(checkpoint)]) for side in case.size or ()]
        assert sides
        assert max(sides) <= largest_side(checkpoint)
    assert largest_side(Checkpoint.open(tiny)) == 128
    assert largest_side(Checkpoint.open(NANO)) == 64
