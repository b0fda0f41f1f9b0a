"""The local Hub and the real client understand each other, faults included. Publishing itself is tested elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hub import Fault, Hub, User
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from publish_data import TOKEN

from bagel_compress.io.hub_client import insist

REPO = "ann/BAGEL-7B-MoT-NF4"


@pytest.fixture
def api(hub: Hub) -> HfApi:
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo(REPO)
    return api


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "build"
    (folder / "reports").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# card\n")
    (folder / "a.safetensors").write_bytes(os.urandom(50_000))
    (folder / "reports" / "parity.json").write_text("{}")
    return folder


def test_upload_list_download_verify(api: HfApi, folder: Path) -> None:
    api.create_repo(REPO, exist_ok=True)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert sorted(api.list_repo_files(REPO)) == [".gitattributes", "README.md", "a.safetensors", "reports/parity.json"]
    got = Path(snapshot_download(REPO, endpoint=api.endpoint))
    assert (got / "a.safetensors").read_bytes() == (folder / "a.safetensors").read_bytes()
    checked = api.verify_repo_checksums(REPO, local_dir=folder)
    assert (checked.checked_count, checked.mismatches, checked.missing_paths) == (3, [], [".gitattributes"])


def test_tree_is_paged(api: HfApi) -> None:
    adds = [CommitOperationAdd(f"f{i:03d}.txt", b"%d" % i) for i in range(45)]
    api.create_commit(REPO, adds, commit_message="many")
    assert len(list(api.list_repo_tree(REPO, recursive=True))) == 46


def test_transient_faults_are_retried_by_the_client(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.faults = [Fault("PUT /lfs/", times=3), Fault("POST .*/preupload/", "slow")]
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert sum(line.startswith("PUT /lfs/") for line in hub.requests) == 4
    assert hub.store.read(REPO, "a.safetensors") == (folder / "a.safetensors").read_bytes()


def test_a_cut_download_is_resumed_by_range(hub: Hub, api: HfApi, folder: Path) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.faults = [Fault("GET /cdn/", "cut")]
    got = Path(insist(lambda: hf_hub_download(REPO, "a.safetensors")))  # some versions do not try again themselves
    assert got.read_bytes() == (folder / "a.safetensors").read_bytes()
    assert sum(line.startswith("GET /cdn/") for line in hub.requests) == 2


def test_a_flipped_byte_is_not_noticed_by_the_client(hub: Hub, api: HfApi, folder: Path) -> None:
    """Why we check digests ourselves: the client compares sizes only."""
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.faults = [Fault("GET /cdn/", "flip")]
    assert Path(hf_hub_download(REPO, "a.safetensors")).read_bytes() != (folder / "a.safetensors").read_bytes()


def test_tokens_owners_and_private_repositories(hub: Hub, api: HfApi) -> None:
    hub.store.users["hf_read"] = User("ann", role="read")
    hub.store.users["hf_old"] = User("ann", expired=True)
    hub.store.users["hf_bob"] = User("bob")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.url, token="hf_read").create_repo("ann/other")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_old").whoami()
    api.create_repo("ann/secret", private=True)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token="hf_bob").model_info("ann/secret")


def test_pull_requests_branches_and_parents(hub: Hub, api: HfApi) -> None:
    hub.store.users["hf_bob"] = User("bob")
    bob = HfApi(endpoint=hub.url, token="hf_bob")
    start = api.model_info(REPO).sha
    pull = bob.create_commit(REPO, [CommitOperationAdd("x.txt", b"x")], commit_message="x", create_pr=True)
    assert pull.pr_url
    assert api.model_info(REPO).sha == start
    assert "x.txt" in api.list_repo_files(REPO, revision="refs/pr/1")
    api.create_branch(REPO, branch="v2")
    api.create_commit(REPO, [CommitOperationAdd("y.txt", b"y")], commit_message="y", revision="v2")
    api.create_commit(REPO, [CommitOperationDelete("y.txt")], commit_message="-y", revision="v2")
    assert "y.txt" not in api.list_repo_files(REPO, revision="v2")
    api.create_commit(REPO, [CommitOperationAdd("z.txt", b"z")], commit_message="z", parent_commit=start)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, [CommitOperationAdd("w.txt", b"w")], commit_message="w", parent_commit=start)


def test_a_commit_cannot_name_what_was_not_uploaded(hub: Hub, api: HfApi) -> None:
    operation = CommitOperationAdd("big.safetensors", os.urandom(1000))
    api.preupload_lfs_files(REPO, [operation], free_memory=False)
    hub.store.objects.pop(operation.upload_info.sha256.hex())
    with pytest.raises(HfHubHTTPError, match="does not exist"):
        api.create_commit(REPO, [operation], commit_message="x")


def test_collections(api: HfApi) -> None:
    collection = api.create_collection("BAGEL builds", namespace="ann", exists_ok=True)
    api.add_collection_item(collection.slug, REPO, "model", exists_ok=True)
    again = api.create_collection("BAGEL builds", namespace="ann", exists_ok=True)
    api.add_collection_item(again.slug, REPO, "model", exists_ok=True)
    assert [item.item_id for item in api.get_collection(collection.slug).items] == [REPO]
