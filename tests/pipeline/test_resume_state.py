"""The state of a build in its folder: what a failure leaves, which records count, what space is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bagel_compress.build import resume_state
from bagel_compress.build.manifest import FileEntry
from bagel_compress.build.resume_state import STATE, BuildFolder, ShardRecord
from bagel_compress.errors import ArtifactError


def folder(out: Path) -> BuildFolder:
    return BuildFolder(out, SimpleNamespace(digest="a" * 64))  # type: ignore[arg-type]


def test_a_folder_that_could_not_be_taken_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not after Ctrl-C: the next command would be told that a build is going on."""
    for fault in (KeyboardInterrupt, OSError):

        def fails(*rest: object, fault: type[BaseException] = fault) -> None:
            raise fault

        with monkeypatch.context() as patch:
            patch.setattr(resume_state, "write_atomic", fails)
            with pytest.raises(fault):
                folder(tmp_path / "a").__enter__()
        assert not (tmp_path / "a" / STATE / "lock").exists()


def test_half_written_files_are_removed_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "a"
    with folder(out):
        assert (out / STATE / "lock").exists()
    for name in ("x.safetensors.partial", "y.safetensors"):
        (out / name).write_bytes(b"1")
    with folder(out):
        assert sorted(p.name for p in out.iterdir()) == [STATE, "y.safetensors"]
    assert json.loads((out / STATE / "plan.json").read_text()) == {"plan": "a" * 64}
    assert not (out / STATE / "lock").exists()


def test_a_record_counts_if_its_file_is_there_in_full(tmp_path: Path) -> None:
    with folder(tmp_path) as build:
        record = ShardRecord(file=FileEntry(bytes=5, blake3="0" * 64), units={})
        assert build.record("s") is None
        build.finish_shard("s", record)
        assert build.record("s") is None  # the file is missing
        (tmp_path / "s").write_bytes(b"12345")
        assert build.record("s") == record
        for other in (b"1234", b"123456"):
            (tmp_path / "s").write_bytes(other)
            assert build.record("s") is None
        (tmp_path / "s").write_bytes(b"12345")
        (tmp_path / STATE / "s.json").write_text("{")
        assert build.record("s") is None


def test_space_is_asked_for_to_the_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_state.shutil, "disk_usage", lambda path: SimpleNamespace(free=7_000_000))
    folder(tmp_path).check_space(7_000_000)
    with pytest.raises(ArtifactError, match=r"needs 9\.000 MB more, its disk has 7\.000 MB free; free 2\.000 MB or"):
        folder(tmp_path).check_space(9_000_000)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "[" * 100_000])
def test_a_plan_that_cannot_be_read_is_another_one(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE).mkdir()
    (tmp_path / STATE / "plan.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"begun build of another plan \(unreadable, this one is aaaaaaaaaaaa\)"):
        folder(tmp_path).__enter__()


def test_the_first_foreign_file_is_named(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ArtifactError, match=r"is not empty \(a\.txt\)"):
        folder(tmp_path).__enter__()
