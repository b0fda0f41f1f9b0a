"""Compressed answers of the Hub are refused before they are unpacked: 100 KB of gzip would be 100 MB in memory.

Plain ones are refused once they are longer than any has to be.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from hub import ROUTES, Answer, Hub
from publish_data import BASE, REPO

from bagel_compress.build.artifact import Artifact
from bagel_compress.io import hub_client

Cli = Callable[..., tuple[int, str, str]]
KINDS = (
    "whoami", "info", "create", "preupload", "lfs_batch", "lfs_put", "lfs_verify", "commit", "tree", "resolve", "cdn",
    "collection_new", "collection", "collection_add", "validate_yaml",
)  # fmt: skip
UNPACKED = 100 << 20  # bytes
LONG = 3 << 20  # bytes of a plain answer
ALLOWED = 32 << 20  # bytes by which the process may grow meanwhile


@pytest.fixture(scope="module")
def bomb() -> bytes:
    packer, block = zlib.compressobj(9, wbits=31), bytes(1 << 20)
    packed = b"".join(packer.compress(block) for _ in range(UNPACKED >> 20)) + packer.flush()
    assert len(packed) < 200_000
    return packed


def kind_of(line: str) -> str:
    """The name of the endpoint that "METHOD /path" asks for; empty for HEAD, whose answer has no body."""
    method, address = line.split(" ", 1)
    path = unquote(urlsplit(address).path)
    found = (
        handler.__name__ for methods, pattern, handler in ROUTES if method in methods and re.fullmatch(pattern, path)
    )
    return "" if method == "HEAD" else next(found)


def publish_and_verify(
    cli: Cli, artifact: Artifact, receipts: Path, fresh_cache: Callable[[], Path]
) -> tuple[int, str]:
    """Exit code and stderr of the first command that fails, or of the last one."""
    options = ("--base-model", BASE, "--receipts", receipts, "--collection", "builds")
    code, _, err = cli("publish", artifact.path, REPO, *options)
    if code == 0:
        fresh_cache()
        code, _, err = cli("verify", REPO, "--full")
    return code, err


def peak() -> int:
    """Bytes of the largest resident memory since it was last reset; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def test_these_are_all_kinds_of_answers(
    hub: Hub, artifact: Artifact, cli: Cli, tmp_path: Path, fresh_cache: Callable[[], Path]
) -> None:
    assert publish_and_verify(cli, artifact, tmp_path / "receipts", fresh_cache)[0] == 0
    assert {kind_of(line) for line in hub.requests} - {""} == set(KINDS)


@pytest.mark.parametrize(("kind", "status"), [*((kind, 200) for kind in KINDS), ("info", 404), ("cdn", 404)])
def test_a_compressed_answer_is_refused(
    hub: Hub, artifact: Artifact, cli: Cli, tmp_path: Path, fresh_cache: Callable[[], Path], bomb: bytes,
    kind: str, status: int,
) -> None:  # fmt: skip
    sent = []

    def explode(line: str, answer: Answer) -> Answer:
        if kind_of(line) != kind:
            return answer
        sent.append(line)
        return status, bomb, answer[2] | {"Content-Encoding": "gzip"}

    hub.altered = explode
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak of resident memory begins anew
    before = peak()
    code, err = publish_and_verify(cli, artifact, tmp_path / "receipts", fresh_cache)
    assert len(sent) == len(set(sent)) > 0  # neither the client nor the program asks again
    assert code == 2
    assert "the Hub's answer is compressed (gzip)" in err
    assert err.strip().splitlines()[-1].count(". ") == 0
    assert peak() - before < ALLOWED


@pytest.mark.parametrize(
    ("kind", "status"),
    [*((k, 200) for k in KINDS if k not in ("resolve", "cdn")), ("info", 404), ("cdn", 404), ("resolve", 307)],
)
def test_a_long_answer_is_refused(
    hub: Hub, artifact: Artifact, cli: Cli, tmp_path: Path, fresh_cache: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch, kind: str, status: int,
) -> None:  # fmt: skip
    """An answer to a question, an error, a redirection; files alone have any length."""
    sent = []

    def lengthen(line: str, answer: Answer) -> Answer:
        if kind_of(line) != kind:
            return answer
        sent.append(line)
        return status, b" " * LONG, answer[2]

    hub.altered = lengthen
    monkeypatch.setattr(hub_client, "LONGEST", 2 << 20)
    code, err = publish_and_verify(cli, artifact, tmp_path / "receipts", fresh_cache)
    assert len(sent) == len(set(sent)) > 0
    assert code == 2
    assert "the Hub's answer is longer than 2 MiB, which none has to be; check HF_ENDPOINT" in err


def test_plain_answers_are_asked_for_also_by_a_session_made_after_an_error(hub: Hub) -> None:
    from huggingface_hub.utils import close_session, get_session

    from bagel_compress.io.hub_client import failures

    for _ in range(2):
        with failures("a test failed"):
            session = get_session()
        assert session.headers["Accept-Encoding"] == "identity"
        assert len(session.event_hooks["response"]) == 1
        close_session()
