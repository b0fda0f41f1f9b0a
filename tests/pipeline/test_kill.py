"""kill -9 at random moments of a build: the resumed artifact is byte-identical each time."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
from pathlib import Path

import pytest
from pipeline_data import RAW, folder_bytes

from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.synthetic import synthesise

KILLS = 20
KILLS_PER_BUILD = 4


def _build(source: str, out: str, unit: int | None, seconds: float) -> None:
    """Builds; `seconds` after the given number of units the process gets a SIGKILL, wherever it then is."""
    seen = [0]

    def progress(name: str, nbytes: int) -> None:
        if seen[0] == unit:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        seen[0] += 1

    checkpoint = Checkpoint.open(source)
    compress(make_plan(checkpoint, Recipe.parse(RAW, "raw")), checkpoint, out, progress)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are POSIX")
def test_kill_9_at_twenty_random_moments(tmp_path: Path) -> None:
    synthesise("tiny", tmp_path / "source", seed=3, layers=6)
    source, out = str(tmp_path / "source"), tmp_path / "killed"
    _build(source, str(tmp_path / "whole"), None, 0.0)
    expected = folder_bytes(tmp_path / "whole")
    units = len(Checkpoint.open(source).specs)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "bagel_compress.build.compress"])  # children that have torch in 30 ms

    def run(unit: int | None, seconds: float = 0.0) -> bool:
        child = context.Process(target=_build, args=(source, str(out), unit, seconds))
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        return child.exitcode == 0

    rng = random.Random(20)
    finished: list[bool] = []
    for kill in range(KILLS):
        finished.append(run(rng.randrange(units), rng.uniform(0, 0.03)))
        if finished[-1] or kill % KILLS_PER_BUILD == KILLS_PER_BUILD - 1:
            assert run(None)
            assert folder_bytes(out) == expected
            out.rename(tmp_path / f"done{kill}")
    assert sum(finished) <= KILLS // 4  # else the kills came too late to mean anything
