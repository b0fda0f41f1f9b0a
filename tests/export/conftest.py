"""The tiny checkpoint exported once, and the templates of its graphs shared by every other export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from bagel_compress.export.build import export
from bagel_compress.export.manifest import ExportFolder
from bagel_compress.export.source import Source
from bagel_compress.runtime import ExportSettings

LAYERS = ("und_layer", "gen_layer")


@pytest.fixture(scope="session")
def templates() -> dict[str, bytes]:
    return {}


@pytest.fixture(scope="session")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory, templates: dict[str, bytes]) -> ExportFolder:
    """The whole tiny model in fp32."""
    out = tmp_path_factory.mktemp("export") / "fp32"
    return export(Source.open(tiny), ExportSettings(), "ort-cpu", out, templates=templates)


@pytest.fixture
def make(tmp_path: Path, templates: dict[str, bytes]) -> Callable[..., ExportFolder]:
    """Exports a source with settings given as keywords."""

    def make(source: Source, name: str = "out", **settings: object) -> ExportFolder:
        return export(source, ExportSettings.model_validate(settings), "test", tmp_path / name, templates=templates)

    return make
