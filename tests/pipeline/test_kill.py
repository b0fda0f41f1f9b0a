"""kill -9 at random moments of a build: the resumed artifact is byte-identical each time."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from pipeline_data import RAW, folder_bytes

from bagel_compress.artifact import MANIFEST

KILLS = 20


def _build(source: str, out: str) -> None:
    from bagel_compress.checkpoint import Checkpoint
    from bagel_compress.plan import make_plan
    from bagel_compress.recipe import Recipe
    from bagel_compress.stream import compress

    checkpoint = Checkpoint.open(source)
    compress(make_plan(checkpoint, Recipe.parse(RAW, "raw")), checkpoint, out)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are POSIX")
def test_kill_9_at_twenty_random_moments(tmp_path: Path) -> None:
    from bagel_compress.synth import synthesise

    synthesise("tiny", tmp_path / "source", seed=3, layers=8)
    _build(str(tmp_path / "source"), str(tmp_path / "whole"))
    expected = folder_bytes(tmp_path / "whole")

    context = multiprocessing.get_context("forkserver")  # children that have torch in 30 ms
    context.set_forkserver_preload(["torch", "bagel_compress.stream"])
    start = time.monotonic()
    _run(context, tmp_path, "timed", None)
    whole = time.monotonic() - start
    rng = random.Random(20)
    unfinished = 0
    for kill in range(KILLS):
        _run(context, tmp_path, "killed", rng.uniform(0.1, 1.0) * whole / 3)  # several kills per build
        if (tmp_path / "killed" / MANIFEST).exists() or kill == KILLS - 1:
            _run(context, tmp_path, "killed", None)
            assert folder_bytes(tmp_path / "killed") == expected
            (tmp_path / "killed").rename(tmp_path / f"done{kill}")
        else:
            unfinished += 1
    assert unfinished >= KILLS // 2  # else the kills came too late to mean anything


def _run(context: multiprocessing.context.ForkServerContext, folder: Path, name: str, seconds: float | None) -> None:
    child = context.Process(target=_build, args=(str(folder / "source"), str(folder / name)))
    child.start()
    child.join(seconds)
    if seconds is not None and child.is_alive():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == 0 or (seconds is not None and child.exitcode == -signal.SIGKILL)
