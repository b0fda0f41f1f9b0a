"""The gates: what may not be published, and that what may is exactly the folder that was verified."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from publish_data import BASE, REPO, budget, flip, parity

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import ArtifactError, GateError, PublishError
from bagel_compress.io.digests import sha256_file
from bagel_compress.publishing.card_sections import Origin
from bagel_compress.publishing.release import Release, make_release

ORIGIN = Origin(REPO, BASE)


def release(artifact: Artifact, tmp_path: Path, **options: bool) -> Release:
    return make_release(artifact, tmp_path / "release", ORIGIN, **options)


def test_the_folder_holds_what_was_verified(artifact: Artifact, tmp_path: Path) -> None:
    made = release(artifact, tmp_path)
    present = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file()}
    assert present == set(made.files)
    assert {"README.md", "SHA256SUMS", "manifest.json", "report.html", "reports/provenance.json", "reports/build.json",
            "reports/parity.json", "reports/budget-rtx4070-12gb.json", "reports/t2i_square.png"} <= present  # fmt: skip
    for path, entry in made.files.items():
        assert sha256_file(made.folder / path) == entry.sha256
        assert (made.folder / path).stat().st_size == entry.bytes
    assert release(artifact, tmp_path).files == made.files  # the same again, byte for byte


def test_one_reading_takes_all_digests(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bagel_compress.build.manifest_files as build
    import bagel_compress.publishing.release as module

    read: list[str] = []
    matches, sha256_file = build.matches, module.sha256_file
    monkeypatch.setattr(build, "matches", lambda path, *rest: (read.append(path.name), matches(path, *rest))[1])
    monkeypatch.setattr(module, "sha256_file", lambda path: (read.append(path.name), sha256_file(path))[1])
    release = make_release(artifact, tmp_path / "release", ORIGIN)
    assert {name: read.count(Path(name).name) for name in artifact.manifest.files} == dict.fromkeys(
        artifact.manifest.files, 1
    )
    for name, entry in release.files.items():
        assert entry.sha256 == hashlib.sha256((release.folder / name).read_bytes()).hexdigest()


def test_a_file_that_changes_after_it_was_verified(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def meddle(source: Path, target: Path) -> None:
        shard = artifact.path / artifact.manifest.shards[0]
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(bytes(data))
        real(source, target)

    monkeypatch.setattr(os, "link", meddle)
    with pytest.raises(GateError, match="was changed while it was published"):
        make_release(artifact, tmp_path / "release", ORIGIN)


def test_a_copy_is_read_where_files_cannot_be_linked(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr("os.link", refuse)
    release = make_release(artifact, tmp_path / "release", ORIGIN)
    assert not (release.folder / artifact.manifest.shards[0]).samefile(artifact.path / artifact.manifest.shards[0])
    monkeypatch.setattr("shutil.copyfile", lambda source, target: Path(target).write_bytes(b"something else"))
    with pytest.raises(GateError, match="was changed while it was published"):
        make_release(artifact, tmp_path / "release", ORIGIN)


def test_failed_parity(artifact: Artifact, tmp_path: Path) -> None:
    parity(artifact, ok=False).save(artifact.path)
    with pytest.raises(GateError, match=r"parity did not pass: case t2i_square: latent.path is 0.31, above"):
        release(artifact, tmp_path)


def test_missing_budget(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.path / "reports" / "budget-rtx4070-12gb.json").unlink()
    with pytest.raises(GateError, match="it has no budget report"):
        release(artifact, tmp_path)


def test_budget_over_its_limit(artifact: Artifact, tmp_path: Path) -> None:
    budget(artifact, ok=False).save(artifact.path)
    with pytest.raises(GateError, match=r"budget of rtx4070-12gb: rtx4070-12gb: denoise needs 8.90 GiB"):
        release(artifact, tmp_path)


def test_a_promised_target_without_budget(artifact: Artifact, tmp_path: Path) -> None:
    recipe = artifact.manifest.recipe.model_copy(update={"targets": ("rtx4070-12gb", "rtx3090-24gb")})
    changed = artifact.manifest.model_copy(update={"recipe": recipe})
    (artifact.path / "manifest.json").write_bytes(changed.to_bytes())
    promised = Artifact.open(artifact.path)
    parity(promised).save(promised.path)
    budget(promised).save(promised.path)
    with pytest.raises(GateError, match="no budget report for rtx3090-24gb"):
        release(promised, tmp_path)


@pytest.mark.parametrize("stale", ["parity", "budget"])
def test_stale_reports(artifact: Artifact, tmp_path: Path, stale: str) -> None:
    {"parity": parity, "budget": budget}[stale](artifact, "0" * 64).save(artifact.path)
    with pytest.raises(GateError, match="belongs to another build"):
        release(artifact, tmp_path)


def test_a_changed_byte(artifact: Artifact, tmp_path: Path) -> None:
    flip(artifact.path / artifact.manifest.shards[-1])
    for draft in (False, True):
        with pytest.raises(GateError, match=r"model-0000\d-of-0000\d.safetensors was changed: \S+"):
            release(artifact, tmp_path, draft=draft)


def test_of_many_changed_tensors_three_are_named(artifact: Artifact, tmp_path: Path) -> None:
    path = artifact.path / artifact.manifest.shards[-1]
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    starts = sorted(entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__")
    for count, ending in ((3, ""), (4, " and more")):
        changed = bytearray(content)
        for start in starts[:count]:
            changed[8 + size + start] ^= 1
        path.write_bytes(changed)
        with pytest.raises(GateError, match=r"was changed: \S+, \S+, \S+") as error:
            release(artifact, tmp_path)
        assert (" and more" in str(error.value)) == bool(ending)


def test_everything_that_is_missing_is_listed(built: Callable[[str], Artifact], tmp_path: Path) -> None:
    with pytest.raises(GateError) as error:
        make_release(built("nf4"), tmp_path / "release", Origin(REPO, None))
    for missing in ("no parity report", "no budget report", "--base-model"):
        assert missing in str(error.value)
    assert error.value.exit_code == 1


def test_a_draft_needs_no_reports_and_says_so(built: Callable[[str], Artifact], tmp_path: Path) -> None:
    draft = make_release(built("nf4"), tmp_path / "release", ORIGIN, draft=True)
    card = (draft.folder / "README.md").read_text()
    assert "**DRAFT.**" in card
    assert "Not measured." in card


def test_a_draft_does_not_carry_reports_of_another_build(artifact: Artifact, tmp_path: Path) -> None:
    parity(artifact, "0" * 64).save(artifact.path)
    draft = release(artifact, tmp_path, draft=True)
    assert "reports/parity.json" not in draft.files
    assert "reports/t2i_square.png" not in draft.files


def test_a_folder_of_somebody_else_is_not_touched(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(PublishError, match="was not made by publish"):
        release(artifact, tmp_path)
    assert (folder / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "/etc/passwd", "a\\..\\b", "C:evil"])
def test_a_manifest_that_leaves_its_folder(artifact: Artifact, name: str) -> None:
    path = artifact.path / "manifest.json"
    data = json.loads(path.read_bytes())
    data["files"][name] = {"bytes": 1, "blake3": "0" * 64}
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="points outside its folder"):
        Artifact.open(artifact.path)


def test_a_manifest_with_a_shard_elsewhere(artifact: Artifact) -> None:
    path = artifact.path / "manifest.json"
    data = json.loads(path.read_bytes())
    next(iter(data["units"].values()))["shard"] = "../secret.safetensors"
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="not among its files"):
        Artifact.open(artifact.path)


def test_the_recipe_on_the_card_is_the_recipe(artifact: Artifact, tmp_path: Path) -> None:
    card = (release(artifact, tmp_path).folder / "README.md").read_text()
    text = card.partition("```yaml\n")[2].partition("\n```")[0]
    written = Recipe.model_validate(yaml.safe_load(text))  # its target is known to these tests alone
    assert written.digest == artifact.manifest.recipe_digest


def test_a_hard_link_is_the_file_it_names_and_no_way_to_another(artifact: Artifact, tmp_path: Path) -> None:
    """It cannot be told from a file, so what goes out is decided by names and digests, as for every file."""
    secret, folder = tmp_path / "secret.txt", artifact.path
    secret.write_text("secret")
    shared = tmp_path / "shared.safetensors"
    shard = folder / artifact.manifest.shards[0]
    os.link(shard, shared)  # as a tool that saves space does with equal files
    os.link(secret, folder / "notes.txt")
    os.link(secret, folder / "reports" / "notes.txt")
    with pytest.raises(GateError, match=r"notes\.txt is not in the manifest"):
        release(artifact, tmp_path)
    (folder / "notes.txt").unlink()
    made = release(artifact, tmp_path)
    assert made.files[shard.name].sha256 == sha256_file(shared)
    assert "reports/notes.txt" not in made.files
    present = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file()}
    assert present == made.files.keys()

    names = ("reports/t2i_square.png", "reports/parity.json", "config.json")
    for name, refusal in zip(names, ("not the picture that was", "parity", "config.json has 6 bytes"), strict=True):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.link(secret, folder / name)
        with pytest.raises(GateError, match=refusal):
            release(artifact, tmp_path)
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    assert secret.read_text() == "secret"


def test_writing_into_a_release_leaves_the_build_alone(artifact: Artifact, tmp_path: Path) -> None:
    """Weights in it are hard links to the build's; whatever is made for it is a file of its own."""
    before = {p: p.read_bytes() for p in artifact.path.rglob("*") if p.is_file()}
    made = release(artifact, tmp_path)
    own = [p for p in made.folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1]
    assert {p.relative_to(made.folder).as_posix() for p in own} == made.files.keys() - artifact.manifest.files.keys()
    for path in own:
        path.write_bytes(b"")
    release(artifact, tmp_path)  # the old one is removed, name by name
    assert {p: p.read_bytes() for p in artifact.path.rglob("*") if p.is_file()} == before


def test_the_commit_says_what_it_is(artifact: Artifact, tmp_path: Path) -> None:
    name = f"{artifact.manifest.recipe.name}, manifest {artifact.digest[:12]}"
    assert release(artifact, tmp_path).title == name
    assert release(artifact, tmp_path, draft=True).title == f"Draft of {name}"
