"""Families: one table on every card of a base, receipts that say what was measured, and nobody else's cards touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from publish_data import BASE, REPO, TOKEN, write_reports

from bagel_compress.build.artifact import Artifact
from bagel_compress.errors import PublishError
from bagel_compress.publishing.card_sections import TABLE_END, TABLE_START
from bagel_compress.publishing.collection_table import card_with_table
from bagel_compress.publishing.receipt import Receipt
from bagel_compress.publishing.verify import verify_repo

Publish = Callable[..., object]
TITLE, RAW = "BAGEL-7B-MoT builds", "ann/BAGEL-7B-MoT-bf16"


@pytest.fixture
def raw(built: Callable[[str], Artifact], tmp_path: Path) -> Artifact:
    shutil.copytree(built("raw").path, tmp_path / "raw")
    return write_reports(Artifact.open(tmp_path / "raw"))


def card(hub: Hub, repo: str) -> str:
    return hub.store.read(repo, "README.md").decode()


def test_one_table_on_all_cards(hub: Hub, artifact: Artifact, raw: Artifact, publish: Publish) -> None:
    publish(artifact, collection=TITLE)
    assert RAW not in card(hub, REPO)
    done = publish(raw, RAW, collection=TITLE)
    assert set(done.cards) == {REPO, RAW}  # type: ignore[attr-defined]
    tables = {card(hub, r).partition(TABLE_START)[2].partition(TABLE_END)[0] for r in (REPO, RAW)}
    assert len(tables) == 1
    (table,) = tables
    assert table.index(REPO) < table.index(RAW)  # smallest first
    assert "8.70 GiB" in table
    (collection,) = hub.store.collections.values()
    assert [item["id"] for item in collection["items"]] == [REPO, RAW]
    for repo in (REPO, RAW):
        assert verify_repo(repo).faults == ()  # a renewed card breaks nothing
    commits = len(hub.store.repos[REPO].commits)
    publish(raw, RAW, collection=TITLE)
    assert len(hub.store.repos[REPO].commits) == commits  # the same table again is no commit


def test_the_table_stays_when_a_build_is_published_again(hub: Hub, artifact: Artifact, publish: Publish) -> None:
    publish(artifact, collection=TITLE)
    before = card(hub, REPO)
    publish(artifact)
    assert card(hub, REPO) == before


def test_another_base_is_refused(hub: Hub, artifact: Artifact, raw: Artifact, publish: Publish) -> None:
    publish(artifact, collection=TITLE)
    with pytest.raises(PublishError, match=r"a build of ByteDance-Seed/BAGEL-7B-MoT; this one is of me/other"):
        publish(raw, RAW, collection=TITLE, base_model="me/other")
    assert RAW not in card(hub, REPO)
    (collection,) = hub.store.collections.values()
    assert [item["id"] for item in collection["items"]] == [REPO]


def test_members_that_are_not_ours_are_left_alone(hub: Hub, artifact: Artifact, publish: Publish) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("ann/something")
    collection = api.create_collection(TITLE, namespace="ann")
    api.add_collection_item(collection.slug, "ann/something", "model")
    done = publish(artifact, collection=TITLE)
    assert done.cards == (REPO,)  # type: ignore[attr-defined]
    assert set(hub.store.repos["ann/something"].head("main").files) == {".gitattributes"}


@pytest.mark.parametrize("option", [{"draft": True}, {"create_pr": True}, {"revision": "next"}], ids=str)
def test_a_collection_shows_main_alone(hub: Hub, artifact: Artifact, publish: Publish, option: dict[str, Any]) -> None:
    with pytest.raises(PublishError, match="leave out --collection"):
        publish(artifact, collection=TITLE, **option)
    assert not hub.store.repos
    assert not hub.store.collections


def test_a_card_without_a_place_for_the_table() -> None:
    with pytest.raises(PublishError, match="lacks the markers of the table"):
        card_with_table("# my own card\n", "table")


def test_receipts(hub: Hub, artifact: Artifact, publish: Publish) -> None:
    done = publish(artifact)
    (path,) = done.receipts  # type: ignore[attr-defined]
    assert path.name == "nf4--rtx4070-12gb.json"
    receipt = Receipt.model_validate_json(path.read_text())
    assert receipt.commit == hub.store.repos[REPO].refs["main"]
    assert receipt.artifact == artifact.digest
    assert (receipt.peak_predicted, receipt.peak_measured) == (8.7 * 2**30, 8.9 * 2**30)
    assert receipt.timings[0].median == 0.41
    assert receipt.parity.items() >= {"latent.path": 0.11, "image.psnr": 24.5}.items()
    assert str(artifact.path) not in path.read_text()


def test_no_receipt_without_arrival(
    hub: Hub, artifact: Artifact, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hub_store import File, Store

    real = Store.commit

    def damaging(store: Store, *rest: object) -> object:
        commit = real(store, *rest)  # type: ignore[arg-type]
        commit.files["vocab.json"] = File("0" * 40, 3, lfs=False)
        return commit

    monkeypatch.setattr(Store, "commit", damaging)
    with pytest.raises(Exception, match=r"vocab\.json differs"):
        publish(artifact)
    assert not (tmp_path / "receipts").exists()


def test_a_pull_request_is_no_release_yet(hub: Hub, artifact: Artifact, publish: Publish, tmp_path: Path) -> None:
    from hub import User

    hub.store.users["hf_bobbobbob"] = User("bob")
    hub.store.create(hub.store.users["hf_bobbobbob"], None, "builds", private=False)
    done = publish(artifact, "bob/builds", create_pr=True)
    assert done.receipts == ()  # type: ignore[attr-defined]
    assert done.uploaded.pull_request  # type: ignore[attr-defined]


def test_numbers_of_the_table_come_from_files(hub: Hub, artifact: Artifact, publish: Publish) -> None:
    publish(artifact)
    build = json.loads(hub.store.read(REPO, "reports/build.json"))
    assert build["base_model"] == BASE
    assert build["formats"] == ["nf4", "raw"]
