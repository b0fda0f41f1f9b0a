"""What a gate believes of reports: the values of the cases, and nothing that follows from them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from publish_data import BASE, REPO, budget, parity, picture

from bagel_compress.budgets.overruns import overruns
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import listed_files
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import ArtifactError, CheckpointError, GateError, RecipeError
from bagel_compress.parity.report_data import ParityReport, load_budgets
from bagel_compress.parity.verdict import not_measured
from bagel_compress.publishing.card_sections import Origin
from bagel_compress.publishing.publishable import source_of
from bagel_compress.publishing.release import make_release
from bagel_compress.publishing.release_reports import load_reports
from bagel_compress.publishing.verify import verify_folder
from bagel_compress.source.checkpoint import Checkpoint

PARITY = "reports/parity.json"


def faults(artifact: Artifact) -> str:
    return "; ".join(load_reports(artifact)[1])


def edit(artifact: Artifact, **changes: Any) -> None:
    data = json.loads((artifact.path / PARITY).read_bytes())
    (artifact.path / PARITY).write_text(json.dumps(data | changes))


def test_a_limit_that_was_not_measured_does_not_hold(artifact: Artifact) -> None:
    whole = parity(artifact)
    assert faults(artifact) == ""
    chat = whole.cases[0].model_copy(update={"kind": "chat", "metrics": {}, "has_image": False})
    edit(artifact, cases=[chat.model_dump(mode="json")], rows=[])
    assert "latent.path has a limit and was not measured." in faults(artifact)
    assert "The cases hold no edit." in faults(artifact)
    assert "linear.gain has a limit and was not measured." in faults(artifact)
    edit(artifact, cases=[], rows=[])
    assert "vae.psnr has a limit and was not measured." in faults(artifact)


def test_a_case_of_each_task_is_asked_for(artifact: Artifact) -> None:
    cases = parity(artifact).cases
    assert not_measured({}, (), cases, True) == ()
    for case in cases:
        left = [other for other in cases if other is not case]
        assert not_measured({}, (), left, True) != () or case.kind == "t2i"  # `think` is a t2i case as well


@pytest.mark.parametrize(
    "forged",
    [
        {"ok": True},  # of a value beyond its limit
        {"limit": 9.0, "ok": True},
        {"value": 0.01, "ok": True},
        {"floor": 0.0, "ok": True},
    ],
)
def test_rows_are_made_again(artifact: Artifact, forged: dict[str, Any]) -> None:
    parity(artifact, ok=False).save(artifact.path)
    data = json.loads((artifact.path / PARITY).read_bytes())
    rows = [row | forged if row["metric"] == "latent.path" else row for row in data["rows"]]
    edit(artifact, rows=rows)
    assert ParityReport.load(artifact.path).broken == []  # it says so itself
    assert "not those of its cases under the recipe's limits" in faults(artifact)


def test_a_class_of_its_own_choice_is_not_judged_by(artifact: Artifact) -> None:
    edit(artifact, level="8-bit")
    assert "validated as class 8-bit, the recipe's is 4-bit" in faults(artifact)


def test_the_recipe_is_the_one_of_its_digest(artifact: Artifact) -> None:
    data = json.loads((artifact.path / "manifest.json").read_bytes())
    data["recipe"]["limits"]["overrides"]["latent.path"] = 5.0
    (artifact.path / "manifest.json").write_text(json.dumps(data))
    other = Artifact.open(artifact.path)
    parity(other).save(other.path)
    assert "does not match the manifest's recipe_digest" in faults(other)


def test_files_that_are_too_large_are_an_overrun(artifact: Artifact) -> None:
    report = budget(artifact).model_copy(update={"disk": 9_120_000_000, "disk_limit": 9_000_000_000})
    assert overruns(report, None) == (f"{report.target}: the files take 9.12 GB, the limit is 9 GB.",)
    assert overruns(report.model_copy(update={"disk": 9_000_000_000}), None) == ()


def test_overruns_are_computed_again(artifact: Artifact) -> None:
    budget(artifact, ok=False).model_copy(update={"overruns": ()}).save(artifact.path)
    assert "denoise needs 8.90 GiB" in faults(artifact)


def test_a_packaged_target_is_asked_itself(artifact: Artifact) -> None:
    forged = budget(artifact, target="12gb").model_copy(update={"limit": 1e15})
    small = forged.phases[0].model_copy(update={"name": "t2i: denoise", "parts": {"weights": 13e9}})
    forged.model_copy(update={"phases": (small,)}).save(artifact.path)
    assert "t2i: denoise needs 12.11 GiB" in faults(artifact)
    assert "It says nothing of edit." in faults(artifact)


def test_the_picture_is_the_one_that_was_compared(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.path / "reports" / "t2i_square.png").write_bytes(picture()[:-8] + b"12345678")
    with pytest.raises(GateError, match=r"t2i_square\.png is not the picture that was compared"):
        make_release(artifact, tmp_path / "out", Origin.of(source_of(artifact), REPO, BASE, "apache-2.0"))


def test_a_release_holds_what_it_knows_by_name(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.path / "report.html").write_text("<p>9.99 of 10</p>")
    (artifact.path / "reports" / "summary.md").write_text("all well")
    (artifact.path / "reports" / "notes.txt").symlink_to("/etc/hostname")
    (artifact.path / "reports" / "stray.json").write_text("{}")
    made = make_release(artifact, tmp_path / "out", Origin.of(source_of(artifact), REPO, BASE, "apache-2.0"))
    assert {name for name in made.files if name.startswith("reports/")} == {
        "reports/parity.json", "reports/budget-rtx4070-12gb.json", "reports/t2i_square.png", "reports/junit.xml",
        "reports/summary.md", "reports/build.json", "reports/provenance.json",
    }  # fmt: skip
    assert "9.99 of 10" not in (made.folder / "report.html").read_text()
    assert "all well" not in (made.folder / "reports" / "summary.md").read_text()


def test_a_report_that_is_a_link_is_not_released(artifact: Artifact, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.json"
    os.replace(artifact.path / PARITY, moved)
    (artifact.path / PARITY).symlink_to(moved)
    assert "reports/parity.json is a link" in faults(artifact)


@pytest.mark.parametrize("name", ["../../x", "a/b", "/etc/x", "", "a\\b"])
def test_names_in_reports_never_become_paths(artifact: Artifact, name: str) -> None:
    data = json.loads((artifact.path / PARITY).read_bytes())
    data["cases"][0]["name"] = name
    (artifact.path / PARITY).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="no report of this version"):
        ParityReport.load(artifact.path)
    text = budget(artifact).model_copy(update={"target": name}).model_dump_json()
    (artifact.path / "reports" / "budget-x.json").write_text(text)
    with pytest.raises(ArtifactError, match="no report of this version"):
        load_budgets(artifact.path)


def test_a_licence_that_is_a_link_is_not_copied(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in tiny.iterdir():
        shutil.copyfile(file, folder / file.name)
    (folder / "LICENSE").unlink(missing_ok=True)
    (folder / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="LICENSE is a link to /etc/hostname, outside its folder"):
        Checkpoint.open(folder)
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for file in tiny.iterdir():  # the Hub's cache consists of links
        shutil.copyfile(file, cache / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert Checkpoint.open(snapshot).digest == Checkpoint.open(tiny).digest


def test_an_own_target_is_called_as_its_file(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\ntargets: [small]\nrules: [{match: {}, codec: raw}]")
    (tmp_path / "small.yaml").write_text("name: other\ndevice: {name: x, memory_mib: 100}")
    with pytest.raises(RecipeError, match=r"small\.yaml calls itself 'other'"):
        Recipe.load(recipe)
    (tmp_path / "small.yaml").write_text("name: small\ndevice: {name: x, memory_mib: 100}")
    assert Recipe.load(recipe).targets == ("small",)


def test_a_stale_report_is_a_fault_of_a_folder_and_a_missing_one_is_not(artifact: Artifact) -> None:
    parity(artifact, "0" * 64).save(artifact.path)
    assert any("another build" in fault for fault in verify_folder(artifact.path).faults)
    parity(artifact).save(artifact.path)
    (artifact.path / "reports" / "budget-rtx4070-12gb.json").unlink()
    found = verify_folder(artifact.path)
    assert found.faults == ()


def test_a_manifest_is_read_in_full_and_an_export_s_list_alone(artifact: Artifact) -> None:
    manifest = (artifact.path / "manifest.json").read_bytes()
    assert listed_files("manifest.json", manifest, artifact.path) == artifact.manifest.files
    listing = b'{"files": {"a.data": {"bytes": 1, "blake3": "0"}}, "blocks": {}}'
    assert listed_files("export.json", listing, artifact.path)["a.data"].bytes == 1
    with pytest.raises(ArtifactError, match="is damaged at"):
        listed_files("manifest.json", listing, artifact.path)
