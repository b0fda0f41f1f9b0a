"""verify() finds what was done to an artifact, and names it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline_data import NF4

from bagel_compress.api import open_model
from bagel_compress.build import manifest, plan
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.cli import main
from bagel_compress.errors import ArtifactError
from bagel_compress.source.checkpoint import Checkpoint

SHARD = "model-00003-of-00005.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny: Checkpoint) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "a"
    compress(make_plan(tiny, Recipe.parse(NF4, "x")), tiny, out)
    return out


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _flip_weight(folder: Path) -> None:
    from bagel_compress.io.safetensors_file import TensorFile

    tensor = TensorFile.open(folder / SHARD).tensors["language_model.model.layers.1.mlp.up_proj.weight.absmax"]
    flip(folder / SHARD, tensor.stop - 1)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (_flip_weight, f"{SHARD} was changed: language_model.model.layers.1.mlp.up_proj.weight.absmax"),
    (lambda folder: flip(folder / SHARD, 40), f"{SHARD} was changed: its header"),
    (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    (lambda folder: (folder / SHARD).write_bytes(b"x"), f"{SHARD} has 1 bytes, the manifest says"),
    (lambda folder: flip(folder / "llm_config.json", 20), "llm_config.json was changed"),
    (lambda folder: flip(folder / "ae.safetensors", -1), "ae.safetensors was changed"),
    (lambda folder: shutil.copyfile(folder / SHARD, folder / "extra.safetensors"), "extra.safetensors is not in"),
    (lambda folder: (folder / "vae").mkdir() or (folder / "vae" / "x.bin").touch(), "vae/x.bin is not in"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE)
def test_damage_is_found_and_named(folder: Path, damage: Callable[[Path], object], says: str) -> None:
    assert Artifact.open(folder).verify() == []
    damage(folder)
    faults = Artifact.open(folder, check=False).verify()
    assert len(faults) == 1
    assert faults[0].startswith(says)


def test_another_layout_has_another_number(original: Path, tiny: Checkpoint) -> None:
    """Shard order and manifest of a build; where this fails, raise `plan.LAYOUT` and put the new outline's digest here.

    The number is in the digest of plans, so no build goes on in a folder that was begun in another layout.
    """
    built = json.loads((original / MANIFEST).read_text())
    placed = [(p.shard, p.unit.name, p.codec.name()) for p in make_plan(tiny, Recipe.parse(NF4, "x")).placements]
    outline = json.dumps([placed, sorted(keys(built, {*built["units"], *built["files"]}))])
    assert (plan.LAYOUT, hashlib.sha256(outline.encode()).hexdigest()[:16]) == (3, "a2824700c3c4a0dc")


def keys(value: object, names: set[str], path: str = "") -> set[str]:
    """The paths of all keys of a JSON document, with * for names of units and files, and [] for places in lists."""
    if isinstance(value, dict):
        inner = [(path + "/" + ("*" if key in names else key), below) for key, below in value.items()]
    else:
        inner = [(path + "[]", below) for below in value] if isinstance(value, list) else []
    return {found for found, _ in inner} | {found for at, below in inner for found in keys(below, names, at)}


def test_a_trusted_artifact_is_not_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What opening compares, and what --trust leaves out; verify always compares."""
    _flip_weight(folder)
    flip(folder / "ae.safetensors", -1)
    unit = "language_model.model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ArtifactError, match=rf"{unit}\.absmax is not what the manifest says"):
        Artifact.open(folder).parts(unit)
    with pytest.raises(ArtifactError, match=r"ae\.safetensors is not what the manifest says"):
        open_model(folder)
    command = ["generate", str(folder), "a", "--steps", "2", "--size", "32x32", "--out", str(folder.parent / "x.png")]
    assert main(command) == 2
    capsys.readouterr()
    assert main([*command, "--trust"]) == 0
    assert f"{folder}: its bytes are not compared with its manifest (--trust)" in capsys.readouterr().err
    assert len(Artifact.open(folder, trust=True).verify()) == 2


def test_inspect_verify_is_a_gate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verified"] is True
    assert report["snr_db"]["llm gen nf4"][0] > 19  # NF4 of normal weights: about 20.7 dB (rel. error 0.092)
    _flip_weight(folder)
    assert main(["inspect", str(folder), "--verify"]) == 1
    assert "up_proj.weight.absmax" in capsys.readouterr().err
    (folder / SHARD).unlink()
    assert main(["inspect", str(folder), "--verify"]) == 1
    assert main(["inspect", str(folder)]) == 2


def test_reports_beside_an_artifact_are_no_damage(folder: Path) -> None:
    (folder / "reports").mkdir()
    for name in ("README.md", "SHA256SUMS", "reports/parity.json"):
        (folder / name).write_text("x")
    assert Artifact.open(folder).verify() == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "is damaged"),
        ('{"format": 99}', "has format 99, this version reads 1"),
        ('{"format": 1}', "is damaged at"),
    ],
)
def test_broken_manifests(folder: Path, content: str, says: str) -> None:
    (folder / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=says):
        Artifact.open(folder)


def test_a_later_version_reads_the_manifests_of_this_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads((folder / MANIFEST).read_text())["format"] == 1  # that of published builds
    monkeypatch.setattr(manifest, "FORMAT", 2)
    assert Artifact.open(folder).verify() == []
    monkeypatch.setattr(manifest, "FORMAT", 0)
    with pytest.raises(ArtifactError, match="has format 1, this version reads 0; update"):
        Artifact.open(folder)


def test_a_manifest_that_points_outside(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["files"]["../../x"] = {"bytes": 1, "blake3": ""}
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="points outside its folder"):
        Artifact.open(folder)


def test_what_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="give one that compress wrote"):
        Artifact.open(tmp_path)


def test_an_artifact_is_no_checkpoint(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "nf4", "--source", str(original)]) == 2
    assert "is an artifact of bagel-compress" in capsys.readouterr().err
