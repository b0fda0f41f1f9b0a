"""The table of loaders: its proofs are tests that exist, and no loader test is left out of it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from bagel_compress.build.compress import compress
from bagel_compress.build.loader_table import HEAD, loader_rows, loaders_of
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.cli import main
from bagel_compress.codecs import CODECS
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.codecs.int8 import Int8
from bagel_compress.codecs.loaders import DECODED, OURS, RAW
from bagel_compress.io.packaged import find_recipe
from bagel_compress.source.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
# Every test that opens what is stored with somebody else's loader.
LOADER_TESTS = {
    "tests/codecs/test_block_floats.py::test_comfy_kitchen_decodes_the_same_weights",
    "tests/codecs/test_block_floats.py::test_compressed_tensors_decodes_the_same_weights",
    "tests/codecs/test_df11_loader.py::test_the_official_loader_gives_the_same_outputs",
    "tests/codecs/test_dialects.py::test_comfy_kitchen_decodes_the_same_weights",
    "tests/codecs/test_dialects.py::test_compressed_tensors_decodes_the_same_weights",
    "tests/comfyui/test_nodes.py::test_builds_of_several_formats_open",
    "tests/pipeline/test_comfy.py::test_any_build_decodes_to_the_same_file",
    "tests/pipeline/test_interop.py::test_the_official_model_computes_with_what_is_stored",
    "tests/pipeline/test_comfy.py::test_a_file_without_codes_names_its_model",
    "tests/pipeline/test_foreign.py::test_bitsandbytes_loads_int8",
    "tests/pipeline/test_foreign.py::test_bitsandbytes_loads_nf4",
}


def test_the_table_is_what_the_tests_show() -> None:
    codecs = [codec() for codec in CODECS if codec.name() not in ("raw", "ecq")]
    codecs += [Int8(dialect="compressed-tensors"), Fp8(granularity="tensor", dialect="vllm"), Fp8(granularity="tensor")]
    rules = [*OURS, DECODED, *RAW, *(rule for codec in codecs for rule in codec.loaders())]
    assert {rule.proof for rule in rules if rule.proof} == LOADER_TESTS
    for proof in LOADER_TESTS:
        file, _, name = proof.partition("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert all(rule.result == "opens" for rule in rules if rule.proof)


@pytest.mark.parametrize(
    ("recipe", "opens", "wrong"),
    [
        ("raw", "ComfyUI-BAGEL, 2026 rewrite", None),
        ("comfyui-nvfp4", "ComfyUI (comfy-kitchen)", "accelerate"),
        ("w4a16-vllm", "compressed-tensors", "vLLM-Omni 0.30, two stages"),
    ],
)
def test_rows_of_artifacts(tiny: Checkpoint, tmp_path: Path, recipe: str, opens: str, wrong: str | None) -> None:
    artifact = compress(make_plan(tiny, Recipe.load(find_recipe(recipe))), tiny, tmp_path / "a")
    results = {rule.name: rule.result for rule in loaders_of(artifact)}
    assert results[opens] == "opens"
    assert wrong is None or results[wrong] == "wrong"


def test_the_verb_and_the_card_show_the_same(
    tiny: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bagel_compress.publishing.model_card import plain

    artifact = compress(make_plan(tiny, Recipe.load(find_recipe("comfyui-nvfp4"))), tiny, tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a"), "--loaders", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["loaders"]
    assert shown == [dict(zip(HEAD, row, strict=True)) for row in loader_rows(artifact)]
    assert main(["inspect", str(tmp_path / "a"), "--loaders"]) == 0
    assert "comfy-kitchen" in capsys.readouterr().out
    assert plain("x")


def test_a_mixture_opens_nowhere_else_as_it_is(tiny: Checkpoint, tmp_path: Path) -> None:
    artifact = compress(make_plan(tiny, Recipe.load(find_recipe("mixed-16gb"))), tiny, tmp_path / "a")
    assert {rule.result for rule in loaders_of(artifact) if rule not in (*OURS, DECODED)} == {"fails", "wrong"}
