"""Whatever is changed in a file of a build, verification names the file, and whoever reads other values is refused.

A few hundred changes here; `pytest -m slow` makes 10,000. `BAGEL_FUZZ=N` sets another number.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hostile import flipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hostile_files import QUICK, TINY, replaced

from bagel.errors import BagelError
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.source.checkpoint import Checkpoint

WINDOW = 40  # bytes of a file that are damaged together


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    checkpoint = Checkpoint.open(TINY)
    plan = make_plan(checkpoint, Recipe.load("nf4-nearest"))
    return compress(plan, checkpoint, tmp_path_factory.mktemp("changed") / "a")


def read_all(folder: Path, others: set[str]) -> str:
    """Digest of what a consumer of a build reads: every stored tensor, and the files that are no shards."""
    opened, total = Artifact.open(folder), blake3()
    for name in opened.manifest.units:
        for part in opened.parts(name).values():
            total.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name in sorted(others):
        total.update(opened.file(name).read_bytes())
    return total.hexdigest()


def change(artifact: Artifact, count: int) -> None:
    others = set(artifact.manifest.files) - set(artifact.manifest.shards)
    whole = read_all(artifact.path, others)

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=count == QUICK,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data(), st.sampled_from(sorted(artifact.manifest.files)))
    def run(data: st.DataObject, name: str) -> None:
        before = (artifact.path / name).read_bytes()
        at = data.draw(st.integers(0, len(before) - 1))
        stop = min(len(before), at + data.draw(st.integers(0, WINDOW)))
        damaged = before[:at] + data.draw(flipped(before[at:stop])) + before[stop:]
        if damaged == before:
            return
        with replaced(artifact.path / name, damaged):
            with contextlib.suppress(BagelError):  # a header may be written otherwise and say the same
                assert read_all(artifact.path, others) == whole
            assert any(name in fault for fault in artifact.verify())

    run()


def test_a_changed_build_is_never_taken(artifact: Artifact) -> None:
    change(artifact, QUICK)


@pytest.mark.slow
def test_ten_thousand_changed_builds(artifact: Artifact) -> None:
    change(artifact, 10_000)
