"""The table of loaders: its proofs are tests that exist, and no loader test is left out of it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from test_other_loaders import COMFYUI, COMPRESSED_TENSORS

from bagel_compress.build.compress import compress
from bagel_compress.build.loader_table import HEAD, loader_rows, loaders_of
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.cli import main
from bagel_compress.codecs import CODECS
from bagel_compress.codecs.base import Codec
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.codecs.int4 import Int4
from bagel_compress.codecs.int8 import Int8
from bagel_compress.codecs.loaders import DECODED, OURS, RAW, SERVED
from bagel_compress.io.packaged import find_recipe
from bagel_compress.source.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]


def loader_tests() -> set[str]:
    """Every test with the mark `loader`, as "tests/file.py::function"."""
    found = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "pytest.mark.loader" in map(ast.unparse, node.decorator_list):
                found.add(f"{path.relative_to(ROOT).as_posix()}::{node.name}")
    return found


def all_codecs() -> list[Codec]:
    """Every format that has loaders, in every dialect."""
    codecs = [codec() for codec in CODECS if codec.name() not in ("raw", "ecq")]
    dialects = [Int8(dialect="compressed-tensors"), Fp8(granularity="tensor", dialect="vllm")]
    return [*codecs, *dialects, Fp8(granularity="tensor"), Int4(group=64, symmetric=False), Int4(dialect="auto-round")]


def test_the_table_is_what_the_tests_show() -> None:
    rules = [*OURS, DECODED, *RAW, SERVED, *(rule for codec in all_codecs() for rule in codec.loaders())]
    assert {rule.proof for rule in rules if rule.proof} == loader_tests()
    assert all(rule.result == "opens" for rule in rules if rule.proof)


@pytest.mark.parametrize(
    ("name", "tested"), [("compressed-tensors", COMPRESSED_TENSORS), ("ComfyUI (comfy-kitchen)", COMFYUI)]
)
def test_a_package_is_named_for_what_its_test_opens(name: str, tested: list[Codec]) -> None:
    """Not for a format or a dialect more, nor less."""
    claimed = {dialect(codec) for codec in all_codecs() if name in {rule.name for rule in codec.loaders()}}
    assert claimed == {dialect(codec) for codec in tested}


def dialect(codec: Codec) -> tuple[object, ...]:
    """What decides who can open it: not how scales were found, nor the size of a group."""
    return (codec.format, *(getattr(codec, field, None) for field in ("dialect", "granularity", "symmetric")))


@pytest.mark.parametrize(
    ("recipe", "opens", "wrong"),
    [
        ("raw", "ComfyUI-BAGEL, 2026 rewrite", None),
        ("fp8-vllm", "vLLM-Omni, one stage", "vLLM-Omni 0.30, two stages"),
        ("comfyui-nvfp4", "ComfyUI (comfy-kitchen)", "accelerate"),
        ("w4a16-vllm", "vLLM-Omni, one stage", "vLLM-Omni 0.30, two stages"),
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
    from bagel_compress.publishing.card_markdown import plain

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
