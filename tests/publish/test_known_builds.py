"""Builds that advise ranks beside the recipes: on the Hub, of which the manifest alone is read, and in folders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hub import Hub
from huggingface_hub import CommitOperationAdd, HfApi
from publish_data import TOKEN

from bagel_compress.budgets import advise as advising
from bagel_compress.budgets.advise import advise
from bagel_compress.budgets.known_builds import known_builds
from bagel_compress.budgets.predict import least_bytes
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import FileEntry, Manifest, SourceEntry, StoredPart, TensorEntry, UnitEntry
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import ArtifactError, HubError
from bagel_compress.io.packaged import find_recipe
from bagel_compress.run.target import Target
from bagel_compress.source.released_header import TrueHeader

REPO, GIB = "ann/BAGEL-7B-MoT-NF4", 2**30


def manifest_of(name: str) -> Manifest:
    """What `compress` would write of the released model by a packaged recipe; every digest is a zero."""
    recipe, none = Recipe.load(find_recipe(name)), "0" * 64
    plan = make_plan(TrueHeader(), recipe)
    units = {
        p.unit.name: UnitEntry(
            codec=p.codec,
            shard=p.shard,
            tensors={s.name: TensorEntry(dtype=s.dtype, shape=s.shape, blake3=none) for s in p.unit.specs},
            parts={
                n: StoredPart(dtype=s.dtype, shape=s.shape, blake3=none)
                for n, s in p.codec.likely_parts(p.unit).items()
            },
        )
        for p in plan.placements
    }
    files = {"ae.safetensors": FileEntry(bytes=335_304_388, blake3=none)}
    for shard in plan.shards:
        nbytes = sum(part.spec.nbytes for unit in units.values() if unit.shard == shard for part in unit.parts.values())
        files[shard] = FileEntry(bytes=nbytes, blake3_tensors=none)
    source = SourceEntry(name="BAGEL-7B-MoT", revision="main", digest=none, data_blake3=none)
    return Manifest(
        tool="test", plan=plan.digest, source=source, recipe=recipe, recipe_digest=none, units=units, files=files
    )


@pytest.fixture
def published(hub: Hub) -> Hub:
    """A Hub with a build of the released model and with a repository that is none."""
    api = HfApi(endpoint=hub.url, token=TOKEN)
    for repo, name, data in (
        (REPO, "manifest.json", manifest_of("nf4-nearest").to_bytes()),
        ("ann/notes", "notes.txt", b"x"),
    ):
        api.create_repo(repo)
        api.create_commit(repo, [CommitOperationAdd(name, data)], commit_message="all")
    hub.requests.clear()
    return hub


def test_a_build_on_the_hub_is_ranked_by_its_manifest_alone(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(build: Any, target: Target) -> Any:
        """The least that a build holds and 3 GiB: predicting it is another test's matter."""
        total = least_bytes(build.units, target, build.config.llm.num_layers) + 3 * GIB
        return SimpleNamespace(peak=total, broken=["too much"] if total > target.limit else [])

    monkeypatch.setattr(advising, "predict", peak)
    [known] = known_builds([REPO])
    assert not [line for line in published.requests if "safetensors" in line]
    assert known.download == known.build.disk > 9.5e9
    choices = advise([Target.load("16gb")], builds=[known], count=20)
    [found] = [choice for choice in choices if choice.name == REPO]
    assert (found.download, found.disk, found.build_seconds) == (known.download, known.download, 0)
    assert f"bagel-compress app {REPO}" in " ".join(found.commands)
    assert not [command for command in found.commands if command.split()[1] in ("compress", "calibrate", "budget")]


def test_names_that_are_no_build(published: Hub, built: Any, tmp_path: Any) -> None:
    with pytest.raises(ArtifactError, match=r"ann/notes has no manifest\.json"):
        known_builds(["ann/notes"])
    with pytest.raises(HubError, match="no such repository"):
        known_builds(["ann/nothing"])
    with pytest.raises(ArtifactError, match="neither a local folder nor"):
        known_builds(["a/b/c"])
    with pytest.raises(ArtifactError, match="holds no build"):
        known_builds([tmp_path])
    small: Artifact = built("fp8-24gb")
    said: list[str] = []
    assert known_builds([small.path], said.append) == known_builds([small.path.parent]) == []
    assert "is left out: it has" in said[0]
