"""A build is of exactly one source, and its manifest names everything that decided a weight."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_data import TINY, Write, folder_bytes
from safetensors.torch import load_file, save_file
from test_adapter import lora, save

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import ArtifactError, CheckpointError
from bagel_compress.source.checkpoint import Checkpoint

Tensors = dict[str, torch.Tensor]
EMBED = "language_model.model.embed_tokens.weight"


class StoppedError(Exception):
    """The build was interrupted by the test."""


def tuned(tensors: Tensors) -> Tensors:
    """One element of a row in the middle, where no sample is taken."""
    changed = dict(tensors)
    changed[EMBED] = changed[EMBED].clone()
    changed[EMBED][120, 33] += 1
    return changed


def build(source: Path, recipe: Recipe, out: Path, **given: Any) -> Artifact:
    checkpoint = Checkpoint.open(source, **given)
    return compress(make_plan(checkpoint, recipe), checkpoint, out)


def interrupted(source: Path, recipe: Recipe, out: Path, shards: int = 2) -> None:
    """A build that ends after some shards."""
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint, recipe)
    last = plan.in_shard(plan.shards[shards])[0].unit.name  # coded once the shards before it are written

    def stops(unit: str, nbytes: int) -> None:
        if unit == last:
            raise StoppedError

    with pytest.raises(StoppedError):
        compress(plan, checkpoint, out, stops)


def test_any_changed_element_changes_the_identity(write: Write, tensors: Tensors, tiny: Checkpoint) -> None:
    other = Checkpoint.open(write(tuned(tensors)))
    assert other.fingerprint == tiny.fingerprint
    assert other.digest != tiny.digest


@pytest.mark.parametrize("name", ["ae.safetensors", "tokenizer.json", "config.json", "llm_config.json", "merges.txt"])
def test_files_beside_the_weights_are_part_of_the_identity(
    write: Write, tensors: Tensors, tiny: Checkpoint, name: str
) -> None:
    folder = write(tensors)
    assert Checkpoint.open(folder).digest == tiny.digest
    if name == "ae.safetensors":
        vae = load_file(folder / name)
        vae["decoder.conv_in.bias"][1] += 1
        save_file(vae, folder / name)
    elif name.endswith(".json"):
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        changed = data if name == "tokenizer.json" else data | {"note": 1}  # a tokenizer counts by its bytes
        (folder / name).write_text(json.dumps(changed, indent=7), encoding="utf-8")
    else:
        (folder / name).write_text((folder / name).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert Checkpoint.open(folder).digest != tiny.digest


@pytest.mark.parametrize("recipe_name", ["raw", "nf4"])
def test_the_manifest_has_the_identity_of_what_was_read(
    recipe_name: str, tiny: Checkpoint, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    artifact = build(TINY, request.getfixturevalue(recipe_name), tmp_path / "a")
    assert artifact.manifest.source.digest == tiny.digest


def test_a_finished_build_of_another_source_is_not_taken_for_this_ones(
    write: Write, tensors: Tensors, nf4: Recipe, tmp_path: Path
) -> None:
    build(TINY, nf4, tmp_path / "a")
    before = folder_bytes(tmp_path / "a")
    with pytest.raises(ArtifactError, match="finished artifact of another checkpoint"):
        build(write(tuned(tensors)), nf4, tmp_path / "a")
    assert folder_bytes(tmp_path / "a") == before
    build(TINY, nf4, tmp_path / "a")


@pytest.mark.parametrize("recipe_name", ["raw", "nf4"])
def test_a_build_goes_on_with_its_own_source_alone(
    recipe_name: str,
    write: Write,
    tensors: Tensors,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    recipe = request.getfixturevalue(recipe_name)
    folder = write(tensors)
    interrupted(folder, recipe, tmp_path / "a")
    save_file(tuned(tensors), folder / "ema.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"source has changed since \({EMBED} differs\)"):
        build(folder, recipe, tmp_path / "a")
    assert not (tmp_path / "a" / "manifest.json").exists()
    save_file(tensors, folder / "ema.safetensors", metadata={"format": "pt"})
    build(folder, recipe, tmp_path / "a")
    build(TINY, recipe, tmp_path / "b")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors", "tokenizer.json", "config.json"])
def test_a_source_that_changes_while_it_is_built_ends_without_a_manifest(
    name: str, write: Write, tensors: Tensors, nf4: Recipe, tmp_path: Path
) -> None:
    """The change leaves size and time of the data as they were."""
    folder, begun = write(tensors), []
    stamp = os.stat(folder / name)

    def changes(unit: str, nbytes: int) -> None:
        if not begun:
            begun.append(unit)
            with (folder / name).open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x01")
            os.utime(folder / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        compress(make_plan(checkpoint, nf4), checkpoint, tmp_path / "a", changes)
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_an_adapter_is_named_in_manifest_and_statement(
    write: Write, tensors: Tensors, nf4: Recipe, tmp_path: Path
) -> None:
    from bagel_compress.publishing.provenance import ListedFile, statement

    folder = save(tmp_path / "my-lora", lora(), r=2, lora_alpha=3)
    artifact = build(TINY, nf4, tmp_path / "a", lora=folder)
    entry = artifact.manifest.source.adapter
    assert entry is not None
    assert (entry.name, entry.scales) == ("my-lora", (1.5, 1.5))
    assert len(entry.blake3) == 64
    assert Artifact.open(tmp_path / "a").manifest.source.adapter == entry
    listed = {name: ListedFile(e.bytes, "0" * 64) for name, e in artifact.manifest.files.items()}
    found = statement(artifact, listed)["predicate"]["buildDefinition"]["resolvedDependencies"][1]
    assert (found["name"], found["digest"]) == ("my-lora", {"blake3": entry.blake3})
    assert build(TINY, nf4, tmp_path / "b").manifest.source.adapter is None


def test_tensors_that_a_fine_tune_lacks_come_from_the_base_and_are_named(
    write: Write, tensors: Tensors, nf4: Recipe, tmp_path: Path
) -> None:
    folder = write({name: value for name, value in tensors.items() if not name.startswith("vit_")})
    with pytest.raises(CheckpointError, match="lacks vit_model"):
        Checkpoint.open(folder)
    (folder / "tokenizer.json").unlink()
    artifact = build(folder, nf4, tmp_path / "a", base=TINY)
    assert artifact.manifest.source.digest == Checkpoint.open(TINY).digest
    entry = artifact.manifest.source.base
    assert entry is not None
    assert (entry.name, entry.files) == ("local", ("tokenizer.json",))
    assert entry.tensors == tuple(sorted(name for name in tensors if name.startswith("vit_")))


def test_the_card_names_the_adapter_and_the_base(tmp_path: Path, write: Write, tensors: Tensors, nf4: Recipe) -> None:
    from bagel_compress.publishing.card_sections import Origin
    from bagel_compress.publishing.model_card import model_card
    from bagel_compress.publishing.release_reports import ReleaseReports

    folder = write({name: value for name, value in tensors.items() if not name.startswith("vit_")})
    lora_folder = save(tmp_path / "my-lora", lora())
    artifact = build(folder, nf4, tmp_path / "a", base=TINY, lora=lora_folder)
    source = artifact.manifest.source
    card = model_card(artifact, ReleaseReports(), Origin.of(source, "me/build", "someone/base"), draft=True)
    assert "base_model_relation: finetune" in card
    assert "with the adapter `my-lora` merged into it" in card
    assert f"| adapter merged | `my-lora`, scale 2, blake3 `{source.adapter.blake3}` |" in card  # type: ignore[union-attr]
    assert "| taken from a base | `local`: " in card
    assert "and nothing else" not in card
    plain = build(TINY, nf4, tmp_path / "b")
    card = model_card(plain, ReleaseReports(), Origin.of(plain.manifest.source, "me/build", "someone/base"), draft=True)
    assert "base_model_relation: quantized" in card
    assert "and nothing else" in card
    assert "adapter" not in card


def test_a_trace_of_an_adapter_is_accepted_for_its_build(tmp_path: Path, nf4: Recipe, cli: Any) -> None:
    folder = save(tmp_path / "my-lora", lora())
    artifact = build(TINY, nf4, tmp_path / "a", lora=folder)
    case = tmp_path / "case.yaml"
    case.write_text("name: one\nkind: chat\nturns: [a cat]\ntext: {max_tokens: 2}\n")
    for given, out in ((("--lora", folder), "with"), ((), "without")):
        code, _, err = cli(
            "trace", case, "--source", TINY, *given, "--out", tmp_path / out, "--floor", "none", "--json"
        )
        assert code == 0, err
    from bagel_compress.errors import TraceError
    from bagel_compress.parity.trace import TraceFile

    TraceFile.open(tmp_path / "with").expect_source(artifact.manifest.source.digest, "a")
    with pytest.raises(TraceError, match="was recorded from"):
        TraceFile.open(tmp_path / "without").expect_source(artifact.manifest.source.digest, "a")


def test_inspect_reads_the_identity_only_when_asked(cli: Any, tiny: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "c")
    code, out, _ = cli("inspect", tmp_path / "c", "--json")
    assert (code, json.loads(out)["digest"]) == (0, None)
    code, out, _ = cli("inspect", tmp_path / "c", "--json", "--verify")
    assert (code, json.loads(out)["digest"]) == (0, tiny.digest)
