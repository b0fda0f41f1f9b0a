"""Provenance: SHA256SUMS for sha256sum, an in-toto statement that other tools read, signatures that hold or do not."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from publish_data import BASE, REPO, flip

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import AdapterEntry, BaseEntry
from bagel_compress.errors import ArtifactError, GateError, MissingExtraError
from bagel_compress.io.digests import sha256_file
from bagel_compress.publishing import provenance
from bagel_compress.publishing.card_sections import Origin
from bagel_compress.publishing.release import Release, make_release
from bagel_compress.publishing.verify import verify_folder

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A P-256 key pair as PEM files: private, public."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def release(artifact: Artifact, tmp_path: Path, key: Path | None = None) -> Release:
    return make_release(artifact, tmp_path / "release", Origin(REPO, BASE), signing_key=key)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_accepts_the_file(artifact: Artifact, tmp_path: Path) -> None:
    made = release(artifact, tmp_path)
    run = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(run, cwd=made.folder).returncode == 0
    flip(made.folder / "reports" / "parity.json")
    assert subprocess.run(run, cwd=made.folder, capture_output=True).returncode == 1


def test_every_file_but_the_card_is_covered(artifact: Artifact, tmp_path: Path) -> None:
    made = release(artifact, tmp_path)
    listed = provenance.read_sums((made.folder / "SHA256SUMS").read_text())
    assert set(made.files) - set(listed) == {"README.md", "SHA256SUMS"}


def test_the_statement(artifact: Artifact, tmp_path: Path) -> None:
    made = release(artifact, tmp_path)
    found = json.loads((made.folder / provenance.PROVENANCE).read_text())
    assert (found["_type"], found["predicateType"]) == (
        "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1",
    )  # fmt: skip
    subjects = {s["name"]: s["digest"] for s in found["subject"]}
    assert subjects.pop("manifest.json") == {"sha256": artifact.digest}
    listed = provenance.read_sums((made.folder / "SHA256SUMS").read_text())
    assert subjects == {
        name: {"sha256": listed[name], **entry.digests} for name, entry in artifact.manifest.files.items()
    }
    definition = found["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["recipe_sha256"] == artifact.manifest.recipe_digest
    assert definition["resolvedDependencies"][0]["digest"]["blake3"] == artifact.manifest.source.data_blake3
    assert "torch" in found["predicate"]["runDetails"]["builder"]["version"]
    judged = {b["name"] for b in found["predicate"]["runDetails"]["byproducts"]}
    assert {"reports/parity.json", "reports/budget-rtx4070-12gb.json"} <= judged


def test_in_toto_reads_the_statement(artifact: Artifact, tmp_path: Path) -> None:
    statement_pb2 = pytest.importorskip("in_toto_attestation.v1.statement_pb2")
    from google.protobuf import json_format
    from in_toto_attestation.v1.statement import Statement

    text = (release(artifact, tmp_path).folder / provenance.PROVENANCE).read_text()
    parsed = json_format.Parse(text, statement_pb2.Statement())
    Statement.copy_from_pb(parsed).validate()


def test_the_same_build_gives_the_same_statement(artifact: Artifact, tmp_path: Path) -> None:
    first = (release(artifact, tmp_path).folder / provenance.PROVENANCE).read_bytes()
    assert (release(artifact, tmp_path).folder / provenance.PROVENANCE).read_bytes() == first


def test_a_signature_holds(artifact: Artifact, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    made = release(artifact, tmp_path, keys[0])
    assert "model.sig" in made.files
    assert "--key" in (made.folder / "README.md").read_text()
    verdict = verify_folder(made.folder, keys[1])
    assert (verdict.signature, verdict.faults) == ("valid", ())
    (made.folder / "README.md").write_text("an edited card")
    assert verify_folder(made.folder, keys[1]).signature == "valid"
    assert verify_folder(made.folder).signature == "not checked (give --key)"


def test_a_signature_over_other_bytes(artifact: Artifact, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    made = release(artifact, tmp_path, keys[0])
    flip(made.folder / "vocab.json", at=10)
    verdict = verify_folder(made.folder, keys[1])
    assert verdict.signature == "not valid"
    assert any("vocab.json" in fault for fault in verdict.faults)


def test_a_signature_by_somebody_else(artifact: Artifact, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    made = release(artifact, tmp_path, keys[0])
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    keys[1].write_bytes(other.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    assert verify_folder(made.folder, keys[1]).signature == "not valid"


def test_no_signature_where_one_is_asked_for(artifact: Artifact, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    made = release(artifact, tmp_path)
    assert verify_folder(made.folder, keys[1]).faults == (f"{made.folder} is not signed: it has no model.sig",)


def test_keys_that_are_none(artifact: Artifact, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    keys[0].write_text("no key")
    with pytest.raises(ArtifactError, match="cannot sign"):
        release(artifact, tmp_path, keys[0])
    made = release(artifact, tmp_path)
    (made.folder / "model.sig").write_text("{}")
    keys[1].write_text("no key")
    with pytest.raises((ArtifactError, GateError)):
        provenance.check_signature(made.folder, keys[1])


def test_without_the_extra(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    with pytest.raises(MissingExtraError, match=r"bagel-compress\[sign\]"):
        release(artifact, tmp_path, tmp_path / "key.pem")


def test_a_signed_release_through_the_hub(
    hub: object, artifact: Artifact, keys: tuple[Path, Path], cli: Cli, tmp_path: Path, fresh_cache: Callable[[], Path]
) -> None:
    receipts = tmp_path / "receipts"
    code, _, err = cli("publish", artifact.path, REPO, "--base-model", BASE, "--sign", keys[0], "--receipts", receipts)
    assert code == 0, err
    fresh_cache()
    code, out, err = cli("verify", REPO, "--key", keys[1])
    assert code == 0, out + err
    assert "signature: valid" in out


def test_the_statement_names_where_weights_came_from(artifact: Artifact) -> None:
    """A revision where there is one; the digest of all values, or the checkpoint's where none was taken."""
    files = {name: provenance.ListedFile(1, "1" * 64) for name in artifact.manifest.files}
    files |= {f"reports/{name}": provenance.ListedFile(1, "2" * 64) for name in ("b.json", "a.json")}

    def origins(**changes: object) -> list[dict[str, object]]:
        source = artifact.manifest.source.model_copy(update={"name": "me/model", "revision": None} | changes)
        build = replace(artifact, manifest=artifact.manifest.model_copy(update={"source": source}))
        found = provenance.statement(build, files)
        assert [s["name"] for s in found["subject"]] == ["manifest.json", *sorted(artifact.manifest.files)]
        judged = found["predicate"]["runDetails"]["byproducts"]
        assert judged == [{"name": f"reports/{n}.json", "digest": {"sha256": "2" * 64}} for n in "ab"]
        return list(found["predicate"]["buildDefinition"]["resolvedDependencies"])

    digest = artifact.manifest.source.digest
    [plain] = origins(data_blake3="3" * 64)
    assert plain == {
        "uri": "hf://me/model", "digest": {"blake3": "3" * 64}, "annotations": {"checkpoint_digest": digest},
    }  # fmt: skip
    [dated] = origins(revision="v1", data_blake3="")
    assert (dated["uri"], dated["digest"]) == ("hf://me/model@v1", {"sha256": digest})
    adapter = AdapterEntry(name="style", blake3="4" * 64, scales=(0.5, 2.0))
    base = BaseEntry(name="me/base", revision="v2", files=("ae.safetensors",), tensors=("a", "b"))
    _, merged, taken = origins(adapter=adapter, base=base)
    assert merged == {
        "name": "style", "digest": {"blake3": "4" * 64}, "annotations": {"scale_least": 0.5, "scale_largest": 2.0},
    }  # fmt: skip
    assert taken == {
        "uri": "hf://me/base@v2", "annotations": {"files": ["ae.safetensors"], "tensors": ["a", "b"]},
    }  # fmt: skip


def test_sums_say_what_is_missing_changed_and_unknown(tmp_path: Path) -> None:
    for name in ("kept", "changed", "z.new", "a.new", "README.md", ".cache/x", ".git/x", "sub/.cache"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    digest = sha256_file(tmp_path / "kept")
    lines = {"kept": digest, "changed": "0" * 64, "gone": digest}
    (tmp_path / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in lines.items()))
    assert provenance.check_sums(tmp_path) == [
        "gone is missing", "changed was changed", "a.new is not in SHA256SUMS", "sub/.cache is not in SHA256SUMS",
        "z.new is not in SHA256SUMS",
    ]  # fmt: skip


@pytest.mark.parametrize("line", [f"{'0' * 63}  a", f"{'0' * 65}  a", f"{'0' * 64} a", f"{'0' * 64}  ../a", "0" * 64])
def test_a_line_that_names_no_file_here(line: str) -> None:
    with pytest.raises(ArtifactError, match="names no file here"):
        provenance.read_sums(line)
