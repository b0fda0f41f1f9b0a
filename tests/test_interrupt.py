"""Ctrl-C at any moment ends in one line and exit code 130, and the same command completes as if nothing had happened.

A handful of moments of each verb here; `pytest -m slow` takes a hundred of each.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from interrupts import bury, calls_of, moments, sigint_at

Cli = Callable[..., tuple[int, str, str]]
counts = pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def interrupt(cli: Cli, call: int, *argv: object) -> None:
    """Runs a command with SIGINT at a call; it may also have been done already, or the signal have come in a `del`."""
    with sigint_at(call):
        code, _, err = cli(*argv)
    assert code in (0, 130), err
    assert "Traceback" not in err
    if code:
        assert err.splitlines()[-1].startswith("bagel-compress: interrupted")


@counts
def test_compress(count: int, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    command = ("compress", "nf4-nearest", "--source", tiny, "--out")
    (code, _, err), calls = calls_of(lambda: cli(*command, tmp_path / "whole"))
    assert code == 0, err
    expected, out = folder_bytes(tmp_path / "whole"), tmp_path / "a"
    for call in moments(calls, count, 1):
        interrupt(cli, call, *command, out)
        bury(out / ".build" / "lock")
        code, _, err = cli(*command, out)
        assert code == 0, (call, err)
        assert folder_bytes(out) == expected, call
        shutil.rmtree(out)


@counts
def test_trace_and_validate(count: int, cli: Cli, tiny: Path, small_cases: Path, tmp_path: Path) -> None:
    build, trace = tmp_path / "a", tmp_path / "t.safetensors"
    assert cli("compress", "raw", "--source", tiny, "--out", build)[0] == 0
    record = ("trace", small_cases, "--source", tiny, "--out", trace, "--floor", "none")
    (code, _, err), calls = calls_of(lambda: cli(*record))
    assert code == 0, err
    before = set(tmp_path.iterdir())
    recorded = trace.read_bytes()
    for call in moments(calls, count, 2):
        trace.unlink()
        interrupt(cli, call, *record)
        assert not trace.exists() or trace.read_bytes() == recorded, call
        assert cli(*record)[0] == 0, call
        assert set(tmp_path.iterdir()) == before, call
        assert trace.read_bytes() == recorded, call

    judge = ("validate", build, "--trace", trace)
    (code, _, err), calls = calls_of(lambda: cli(*judge))
    assert code == 0, err
    expected = folder_bytes(build)
    for call in moments(calls, count, 3):
        for name in expected.keys() - {"manifest.json"}:
            if name.startswith("reports/") or name.endswith(".html"):
                (build / name).unlink()
        interrupt(cli, call, *judge)
        for name, content in folder_bytes(build).items():
            assert content == expected.get(name, content), (call, name)  # whole, or not there
        assert cli(*judge)[0] == 0, call
        assert folder_bytes(build).keys() == expected.keys(), call
