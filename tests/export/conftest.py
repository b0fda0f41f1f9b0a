"""The tiny checkpoint exported once, and exports and builds of it on demand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from export_targets import target

from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.exporting.build import export
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.exporting.source import WeightSource
from bagel_compress.source.checkpoint import Checkpoint

RECIPE = """
name: test
rules:
  - match: {{component: llm, kind: linear}}
    codec: {codec}
  - match: {{}}
    codec: raw
"""


@pytest.fixture(scope="session")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory, templates: dict[str, bytes]) -> ExportFolder:
    """The whole tiny model in fp32."""
    return export(WeightSource.open(tiny), target(), tmp_path_factory.mktemp("export") / "fp32", templates=templates)


@pytest.fixture(scope="session")
def artifact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def build(codec: str) -> Path:
        out = tmp_path_factory.mktemp("artifact") / codec
        checkpoint = Checkpoint.open(tiny)
        compress(make_plan(checkpoint, Recipe.parse(RECIPE.format(codec=codec), codec)), checkpoint, out)
        return out

    return build


@pytest.fixture
def make(tmp_path: Path, templates: dict[str, bytes]) -> Callable[..., ExportFolder]:
    """Exports a source with settings given as keywords."""

    def make(source: WeightSource, name: str = "out", **settings: object) -> ExportFolder:
        return export(source, target(**settings), tmp_path / name, templates=templates)

    return make
