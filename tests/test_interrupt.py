"""Ctrl-C at any moment ends in one line and exit code 130, and the same command completes as if nothing had happened.

A handful of moments of each verb here; `pytest -m slow` takes a hundred of each.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType

import pytest
from interrupts import bury, calls_of, moments, sigint_at, usual_handler

Cli = Callable[..., tuple[int, str, str]]
counts = pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def interrupt(cli: Cli, call: int, *argv: object, function: CodeType | None = None) -> int:
    """Runs a command with SIGINT at a call; it may also have been done already, or the signal have come in a `del`."""
    with sigint_at(call, function):
        code, _, err = cli(*argv)
    assert code in (0, 130), err
    assert "Traceback" not in err
    if code:
        assert err.splitlines()[-1].startswith("bagel-compress: interrupted")
    return code


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


LOCK_CODE = {
    "condition-enter": threading.Condition.__enter__,
    "condition-exit": threading.Condition.__exit__,
    "semaphore-acquire": threading.Semaphore.acquire,
    "context-exit": contextlib._GeneratorContextManager.__exit__,
}


@pytest.mark.parametrize("name", LOCK_CODE)
def test_in_the_code_of_a_lock(name: str, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """Raised there, KeyboardInterrupt would leave the lock taken, and the command would wait for its threads for ever.

    In the first line of `Condition.__exit__`, say, while a job is handed to a thread.
    """
    command = ("compress", "nf4-nearest", "--source", tiny, "--out")
    assert cli(*command, tmp_path / "whole")[0] == 0
    expected, function = folder_bytes(tmp_path / "whole"), LOCK_CODE[name].__code__
    codes = []
    for call in (1, 2, 5, 20):
        out = tmp_path / str(call)
        codes.append(interrupt(cli, call, *command, out, function=function))
        bury(out / ".build" / "lock")
        assert cli(*command, out)[0] == 0
        assert folder_bytes(out) == expected
    assert 130 in codes


@pytest.mark.skipif(sys.platform == "win32", reason="a lock cannot be interrupted there")
def test_an_interrupt_of_a_command_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting is lock code too, and lasts; the interrupt comes nevertheless, and soon."""
    from bagel_compress import cli as command_line

    monkeypatch.setattr(command_line, "_run", lambda words: int(threading.Event().wait(20)))
    begun = time.monotonic()
    with usual_handler():
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        assert command_line.main([]) == 130
    assert time.monotonic() - begun < 10
