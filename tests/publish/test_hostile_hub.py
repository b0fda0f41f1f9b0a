"""Whatever a Hub answers, a download ends in the files that the manifest means or in one sentence, and soon.

A few hundred answers here; `pytest -m slow` makes 10,000. `BAGEL_FUZZ=N` sets another number.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import hostile
from hub import Answer, Fault, Hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import BagelCompressError, HubError
from bagel_compress.io import hub_client
from bagel_compress.publishing.verify import verify_repo
from bagel_compress.run.fetch import fetch
from bagel_compress.source.checkpoint import Checkpoint

TINY = Path(__file__).parents[1] / "data" / "golden" / "checkpoint"
QUICK = int(os.environ.get("BAGEL_FUZZ", "40"))
SECONDS = 2.0  # of this process that one download may take
REPO = "ann/BAGEL-nf4"
ANSWERS = ("/api/models/[^/]+/[^/?]+(/revision/.*)?$", "/tree/", "/resolve/", "/cdn/")  # what a download asks for
HEADERS = ("X-Repo-Commit", "ETag", "Location", "X-Linked-Size", "X-Linked-ETag", "Content-Length", "Link")
VALUES = (
    "", "x", "-1", "9" * 40, "../../../evil", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x", "\u00ff",
    "[", '""', '<x>; rel="next"',
)  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    checkpoint = Checkpoint.open(TINY)
    plan = make_plan(checkpoint, Recipe.load("nf4-nearest"))
    return compress(plan, checkpoint, tmp_path_factory.mktemp("served") / "a")


@pytest.fixture
def served(hub: Hub, artifact: Artifact) -> Hub:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=artifact.path)
    return hub


@st.composite
def alterations(draw: st.DrawFn, listings: list[Any]) -> Callable[[str, Answer], Answer]:
    """What is done to the answers of one kind: another status, a header, a damaged body."""
    kind = draw(st.integers(0, len(ANSWERS) - 1))
    how = draw(st.sampled_from(("status", "header", "no header", "body", "body")))
    status = draw(st.sampled_from((200, 204, 206, 301, 302, 307, 400, 401, 403, 404, 410, 416, 418, 429, 451)))
    name, value = draw(st.sampled_from(HEADERS)), draw(st.sampled_from(VALUES))
    listing = draw(hostile(listings[kind])) if kind < len(listings) and how == "body" else b""
    at, byte = draw(st.floats(0, 1)), draw(st.integers(0, 255))

    def alter(line: str, answer: Answer) -> Answer:
        found, body, headers = answer
        if not re.search(ANSWERS[kind], line):
            return answer
        if how == "status":
            return status, body, headers | ({"Location": value} if 300 <= status < 400 else {})
        if how == "header":
            return found, body, headers | {name: value}
        if how == "no header":
            return found, body, {key: kept for key, kept in headers.items() if key != name}
        where = int(at * len(body))
        return found, listing or body[:where] + bytes([byte]) + body[where + byte % 2 :], headers

    return alter


def fuzz(served: Hub, artifact: Artifact, tmp_path: Path, count: int) -> None:
    from huggingface_hub import HfApi

    cache, heard = Path(os.environ["HF_HOME"]), {}

    def listen(line: str, answer: Answer) -> Answer:
        heard.update({kind: answer[1] for kind in ANSWERS[:2] if re.search(kind, line)})
        return answer

    served.altered = listen
    list(HfApi().list_repo_tree(REPO, recursive=True))
    assert Artifact.open(fetch(REPO)).digest == artifact.digest
    listings = [json.loads(heard[kind]) for kind in ANSWERS[:2]]
    before = {*tmp_path.iterdir(), cache}

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=count == QUICK,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(alterations(listings), st.sampled_from((fetch, verify_repo, Checkpoint.open)))
    def run(alter: Callable[[str, Answer], Answer], read: Callable[[str], object]) -> None:
        shutil.rmtree(cache, ignore_errors=True)
        served.altered = alter
        begun = time.process_time()
        with contextlib.suppress(BagelCompressError):
            found = read(REPO)
            if isinstance(found, Path):  # every file is what some manifest says
                assert Artifact.open(found).verify() == []
        assert time.process_time() - begun < SECONDS
        assert set(tmp_path.iterdir()) <= before

    run()


def test_whatever_a_hub_answers(served: Hub, artifact: Artifact, tmp_path: Path) -> None:
    fuzz(served, artifact, tmp_path, QUICK)


@pytest.mark.slow
def test_ten_thousand_answers(served: Hub, artifact: Artifact, tmp_path: Path) -> None:
    fuzz(served, artifact, tmp_path, 10_000)


@pytest.mark.parametrize("asked", ["/api/models/", "/resolve/", "/cdn/"])
def test_a_hub_that_drips_is_not_waited_for(
    served: Hub, asked: str, monkeypatch: pytest.MonkeyPatch, fresh_cache: Callable[[], Path]
) -> None:
    """Each byte is in time for the client's own limits, which begin anew with it."""
    fresh_cache()
    monkeypatch.setattr(hub_client, "ANSWER", 1.0)
    monkeypatch.setattr(hub_client, "STALLED", 1.0)
    served.faults = [Fault(f"GET .*{asked}", "drip", times=100, seconds=0.2)]
    with pytest.raises(HubError, match="sends almost no data"):
        fetch(REPO)


@pytest.mark.parametrize("name", ["", ".", "..", "../refs", "../../../../evil", "a/b", "/", "a\\b", "a b", "a:b"])
@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag", "X-Repo-Commit"])
def test_a_header_that_would_be_a_path_in_the_cache(
    served: Hub, artifact: Artifact, name: str, header: str, tmp_path: Path
) -> None:
    """The client names files in its cache as the answer says."""

    def altered(line: str, answer: Answer) -> Answer:
        status, body, headers = answer
        value = name if header == "X-Repo-Commit" else f'"{name}"'
        return status, body, headers | {header: value} if line.startswith("HEAD") else headers

    served.altered = altered
    before = set(tmp_path.iterdir())
    for read in (fetch, verify_repo, Checkpoint.open):
        with pytest.raises(HubError, match="after which no file can be called"):
            read(REPO)
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    assert set(tmp_path.rglob("*")) == before - {Path(os.environ["HF_HOME"])}
