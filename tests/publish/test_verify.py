"""verify and fetch: a stranger with an empty cache gets exactly the build, or is told what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import Fault, Hub
from publish_data import REPO, TOKEN, flip, parity

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import listed_files
from bagel_compress.errors import ArtifactError, CheckpointError, HubError
from bagel_compress.io.digests import sha256_file
from bagel_compress.publishing.provenance import PROVENANCE
from bagel_compress.publishing.verify import verify_folder, verify_repo
from bagel_compress.run.fetch import fetch, fetch_model, open_artifact

Publish = Callable[..., object]
Cache = Callable[[], Path]


@pytest.fixture
def online(hub: Hub, artifact: Artifact, publish: Publish, fresh_cache: Cache) -> Artifact:
    publish(artifact)
    hub.requests.clear()
    fresh_cache()
    return artifact


def damage(hub: Hub, name: str, at: int = -1) -> None:
    """One byte of a stored file changes on the Hub's disks; what it lists stays the same."""
    oid = hub.store.repos[REPO].head("main").files[name].oid
    data = bytearray(hub.store.objects[oid])
    data[at] ^= 1
    hub.store.objects[oid] = bytes(data)


def test_fetch_brings_what_is_needed_and_nothing_else(hub: Hub, online: Artifact) -> None:
    folder = fetch(REPO)
    got = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    assert got == {*online.manifest.files, "manifest.json"}
    assert open_artifact(REPO).digest == online.digest
    before = len(hub.requests)
    fetch(REPO)
    assert len([r for r in hub.requests[before:] if r.startswith("GET") and ("/cdn/" in r or "/resolve/" in r)]) == 0


def test_a_file_is_read_once_and_again_when_it_was_touched(online: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    import bagel_compress.run.fetch as hub

    read: list[str] = []
    real = hub.intact
    monkeypatch.setattr(hub, "intact", lambda path, entry: (read.append(path.name), real(path, entry))[1])
    folder = fetch(REPO)
    assert sorted(read) == sorted(Path(name).name for name in online.manifest.files)
    read.clear()
    fetch(REPO)
    assert read == []
    flip((folder / "vocab.json").resolve(), at=5)
    fetch(REPO)
    assert read == ["vocab.json"] * 2  # found wrong, loaded again, found right
    assert Artifact.open(folder).verify() == []


def test_everything(online: Artifact) -> None:
    folder = fetch(REPO, kind="everything")
    assert (folder / "reports" / "t2i_square.png").exists()
    assert verify_folder(folder).faults == ()


def test_a_branch_and_a_commit(hub: Hub, artifact: Artifact, publish: Publish) -> None:
    publish(artifact, revision="v2")
    commit = hub.store.repos[REPO].refs["v2"]
    for name in ("v2", commit):
        assert open_artifact(f"{REPO}@{name}").digest == artifact.digest
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        fetch(REPO)


def test_a_damaged_transfer_is_loaded_again(hub: Hub, online: Artifact) -> None:
    hub.faults = [Fault("GET /cdn/", "flip", times=2)]
    assert Artifact.open(fetch(REPO)).verify() == []
    assert hub.faults[0].times == 0


def test_a_cut_transfer_goes_on(hub: Hub, online: Artifact) -> None:
    hub.faults = [Fault("GET /cdn/", "cut", times=2), Fault("HEAD .*/resolve/", times=1)]
    assert Artifact.open(fetch(REPO)).verify() == []


def test_a_file_that_is_damaged_on_the_hub(hub: Hub, online: Artifact, fresh_cache: Cache) -> None:
    shard = online.manifest.shards[0]
    damage(hub, shard)
    with pytest.raises(ArtifactError, match=rf"{shard} of {REPO} is damaged"):
        fetch(REPO)
    cached = [p for p in fresh_cache().parent.rglob(shard) if "snapshots" in p.parts]
    assert cached == []  # nothing is left that another program could take for good


def test_without_network_the_cache_serves(hub: Hub, online: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(REPO)
    hub.faults = [Fault(".", "cut", times=10**6)]
    assert fetch(REPO) == folder
    flip((folder / online.manifest.shards[0]).resolve())
    with pytest.raises(ArtifactError, match="is damaged in the cache"):
        fetch(REPO)


def test_without_network_and_without_cache(hub: Hub, online: Artifact) -> None:
    hub.faults = [Fault(".", "cut", times=10**6)]
    with pytest.raises(HubError, match="cannot be reached"):
        fetch(REPO)


def test_a_model_is_an_artifact_or_a_checkpoint(hub: Hub, online: Artifact, tiny: Path) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("ann/full")
    api.upload_folder(repo_id="ann/full", folder_path=tiny)
    assert Artifact.open(fetch_model(REPO)).digest == online.digest
    assert (fetch_model("ann/full") / "ema.safetensors").read_bytes() == (tiny / "ema.safetensors").read_bytes()
    api.create_repo("ann/empty")
    with pytest.raises(CheckpointError, match="has no weights"):
        fetch_model("ann/empty")
    hub.faults = [Fault(".", "cut", times=10**6)]
    assert Artifact.open(fetch_model(REPO)).digest == online.digest
    assert (fetch_model("ann/full") / "ema.safetensors").exists()


@pytest.mark.parametrize(
    ("repo", "message"),
    [("ann/nothing", "no such repository"), ("../../etc", "neither a local folder"),
     ("a/b/c", "neither a local folder"), ("ann/..", "neither a local folder")],
)  # fmt: skip
def test_names_that_are_none(hub: Hub, repo: str, message: str) -> None:
    with pytest.raises(HubError, match=message):
        fetch(repo)


def test_verify_folder_names_what_is_wrong(online: Artifact) -> None:
    folder = online.path.with_name("nf4.release")
    good = verify_folder(folder)
    assert (good.faults, good.signature) == ((), "none")
    flip(folder / "reports" / "t2i_square.png")
    (folder / "extra.bin").write_bytes(b"x")
    (folder / "vocab.json").unlink()
    with pytest.raises(ArtifactError, match=r"vocab\.json is missing"):
        verify_folder(folder)
    (folder / "vocab.json").write_bytes((online.path / "vocab.json").read_bytes())
    assert verify_folder(folder).faults == ("reports/t2i_square.png was changed", "extra.bin is not in SHA256SUMS")


def test_verify_an_artifact_that_was_never_published(artifact: Artifact) -> None:
    verdict = verify_folder(artifact.path)
    assert verdict.faults == ()
    assert verdict.files == len(artifact.manifest.files) + 1  # the manifest itself
    flip(artifact.path / artifact.manifest.shards[0])
    assert "was changed" in verify_folder(artifact.path).faults[0]


def test_sums_and_manifest_that_disagree(online: Artifact) -> None:
    """Whoever changes a file and SHA256SUMS with it still has the statement against them, and then the manifest."""
    folder, shard = online.path.with_name("nf4.release"), online.manifest.shards[0]
    old = sha256_file(folder / shard)
    flip(folder / shard)
    new = sha256_file(folder / shard)
    rewrite(folder / "SHA256SUMS", old, new)
    found = f"{shard} has another digest in SHA256SUMS or reports/provenance.json than in the manifest"
    assert verify_folder(folder).faults == (found,)
    statement = sha256_file(folder / PROVENANCE)
    rewrite(folder / PROVENANCE, old, new)
    rewrite(folder / "SHA256SUMS", statement, sha256_file(folder / PROVENANCE))
    (fault,) = verify_folder(folder).faults
    assert fault.startswith(f"{shard} was changed")


def rewrite(path: Path, old: str, new: str) -> None:
    """Replaces text of a released file, which may be a link to the build's own."""
    text = path.read_text()
    assert old in text
    path.unlink()
    path.write_text(text.replace(old, new))


def test_stale_reports_are_a_fault(artifact: Artifact) -> None:
    parity(artifact, "0" * 64).save(artifact.path)
    assert "belongs to another build" in verify_folder(artifact.path).faults[0]


def test_verify_repo_reads_no_weights(hub: Hub, online: Artifact) -> None:
    verdict = verify_repo(REPO)
    assert (verdict.faults, verdict.artifact) == ((), online.digest)
    assert not any("/cdn/" in line for line in hub.requests)


def test_verify_repo_sees_what_was_swapped(hub: Hub, online: Artifact) -> None:
    from hub_store import File

    files = hub.store.repos[REPO].head("main").files
    shard = online.manifest.shards[0]
    files[shard] = File("0" * 64, files[shard].size, lfs=True)
    files["config.json"] = hub.store.keep(b"{}", lfs=False)
    files["evil.py"] = hub.store.keep(b"import os", lfs=False)
    del files["merges.txt"]
    faults = verify_repo(REPO).faults
    assert set(faults) == {
        f"{shard} is not what was released", "config.json is not what was released", "merges.txt is missing",
        "evil.py is not in SHA256SUMS",
    }  # fmt: skip


def test_an_edited_card_is_no_fault(hub: Hub, online: Artifact) -> None:
    files = hub.store.repos[REPO].head("main").files
    files["README.md"] = hub.store.keep(b"---\nlicense: apache-2.0\n---\nbetter words\n", lfs=False)
    assert verify_repo(REPO).faults == ()


def test_verify_full_reads_every_byte(hub: Hub, online: Artifact, fresh_cache: Cache) -> None:
    assert verify_repo(REPO, full=True).how == "every byte read"
    fresh_cache()
    damage(hub, "report.html")
    assert verify_repo(REPO).faults == ("report.html is not what was released",)  # small files are read in any case


def test_sums_that_leave_the_folder(online: Artifact) -> None:
    folder = online.path.with_name("nf4.release")
    with (folder / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  ../../outside\n")
    with pytest.raises(ArtifactError, match="names no file here"):
        verify_folder(folder)


def test_a_manifest_on_the_hub_that_leaves_the_cache(hub: Hub, online: Artifact) -> None:
    files = hub.store.repos[REPO].head("main").files
    data = json.loads(hub.store.read(REPO, "manifest.json"))
    data["files"]["../../../evil"] = {"bytes": 1, "blake3": "0" * 64}
    files["manifest.json"] = hub.store.keep(json.dumps(data).encode(), lfs=False)
    with pytest.raises(ArtifactError, match="points outside its folder"):
        fetch(REPO)


@pytest.mark.parametrize("content", [b"{}", b"[", b'{"files": 3}'])
def test_an_export_that_lists_no_files_is_named(content: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"export\.json is damaged: it lists no files"):
        listed_files("export.json", content, Path("folder"))


def test_files_that_lie_elsewhere_are_refused() -> None:
    content = json.dumps({"files": {"../a": {"bytes": 1, "blake3": "0" * 64}}}).encode()
    with pytest.raises(ArtifactError, match=r"export\.json"):
        listed_files("export.json", content, Path("folder"))
