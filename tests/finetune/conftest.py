from __future__ import annotations

from pathlib import Path

import pytest

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.source.checkpoint import Checkpoint

TINY = Path(__file__).parents[1] / "data" / "golden" / "checkpoint"
CODED = """
name: four-codecs
rules:
- {match: {component: llm, kind: linear, layer: 0}, codec: {format: nf4}}
- {match: {component: llm, kind: linear, layer: 1, expert: und}, codec: {format: int8}}
- {match: {component: llm, kind: linear, layer: 1, expert: gen}, codec: {format: fp8}}
- {match: {component: llm, kind: linear}, codec: {format: ecq, bits: 4.5}}
- {match: {}, codec: raw}
"""


@pytest.fixture(scope="session")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny model with a codec for each layer."""
    out = tmp_path_factory.mktemp("coded") / "artifact"
    checkpoint = Checkpoint.open(TINY)
    return compress(make_plan(checkpoint, Recipe.parse(CODED, "coded.yaml")), checkpoint, out)
