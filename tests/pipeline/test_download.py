"""Checkpoints from the Hub, by the real client from a Hub on localhost: only what is needed, and clear refusals."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline_data import TINY

from bagel_compress.errors import CheckpointError, HubError
from bagel_compress.source.checkpoint import Checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "publish"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub.constants as constants
    from hub import Hub, User

    with Hub() as server:
        server.store.users["hf_token"] = User("ann")
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        yield server


def publish(folder: Path, repo: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo)
    return str(api.upload_folder(repo_id=repo, folder_path=folder).oid)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = Path(shutil.copytree(TINY, tmp_path / "upload"))
    (out / "images").mkdir()
    (out / "images" / "teaser.bin").write_bytes(b"x" * 100)  # what nobody needs
    shutil.copyfile(out / "ema.safetensors", out / "model.safetensors")
    return out


def test_a_repository_id_is_a_source(hub: Any, folder: Path, tiny: Checkpoint) -> None:
    commit = publish(folder, "ann/bagel")
    checkpoint = Checkpoint.open("ann/bagel")
    assert checkpoint.digest == tiny.digest
    assert (checkpoint.name, checkpoint.revision) == ("ann/bagel", commit)
    got = [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert not any("teaser" in line or "model.safetensors" in line for line in got)
    hub.requests.clear()
    assert Checkpoint.open(f"ann/bagel@{commit}").digest == tiny.digest
    assert not any(line.startswith("GET") and "ema.safetensors" in line for line in hub.requests)  # from the cache


def test_what_was_downloaded_is_used_without_network(
    hub: Any, folder: Path, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(folder, "ann/bagel")
    Checkpoint.open("ann/bagel")
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Checkpoint.open("ann/bagel").digest == tiny.digest


def test_a_base_brings_only_small_files(hub: Any, folder: Path, tiny: Checkpoint, tmp_path: Path) -> None:
    publish(folder, "ann/bagel")
    (tmp_path / "tuned").mkdir()
    shutil.copyfile(TINY / "ema.safetensors", tmp_path / "tuned" / "model.safetensors")
    assert Checkpoint.open(tmp_path / "tuned", base="ann/bagel").digest == tiny.digest
    assert not any("ema.safetensors" in line for line in hub.requests if line.startswith("GET"))


def test_a_pull_request_is_a_source_for_building_and_for_running(hub: Any, folder: Path, tiny: Checkpoint) -> None:
    from huggingface_hub import HfApi

    from bagel_compress.run.load import downloaded

    publish(folder, "ann/bagel")
    HfApi().upload_file(
        path_or_fileobj=b"{}", path_in_repo="preprocessor_config.json", repo_id="ann/bagel", create_pr=True
    )
    opened = Checkpoint.open("ann/bagel@refs/pr/1")
    assert (opened.digest, "preprocessor_config.json" in opened.files) == (tiny.digest, True)
    run_from = downloaded("ann/bagel@refs/pr/1")
    assert (run_from / "preprocessor_config.json").is_file()
    assert run_from.name == opened.revision
    assert "preprocessor_config.json" not in Checkpoint.open("ann/bagel").files


def test_repositories_that_cannot_be_used(hub: Any, folder: Path) -> None:
    with pytest.raises(HubError, match=r"ann/none cannot be read: there is no such repo.*check its name"):
        Checkpoint.open("ann/none")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    publish(folder, "ann/empty")
    with pytest.raises(CheckpointError, match="has no weights"):
        Checkpoint.open("ann/empty")
