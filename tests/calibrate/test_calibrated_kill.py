"""kill -9 at ten random moments of a calibrated build: the resumed artifact is byte-identical each time."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
from pathlib import Path

import pytest

from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import find_recipe
from bagel_compress.source.checkpoint import Checkpoint

TINY = Path(__file__).parents[1] / "data/golden/checkpoint"
KILLS = 10
KILLS_PER_BUILD = 5


def _build(out: str, unit: int | None, seconds: float) -> None:
    """Builds nf4 of the tiny checkpoint; `seconds` after so many units the process gets a SIGKILL."""
    seen = [0]

    def progress(name: str, nbytes: int) -> None:
        if seen[0] == unit:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        seen[0] += 1

    checkpoint = Checkpoint.open(TINY)
    compress(make_plan(checkpoint, Recipe.load(find_recipe("nf4"))), checkpoint, out, progress)


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are POSIX")
def test_kill_9_at_ten_random_moments(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "bagel_compress.build.calibrated"])

    def run(out: Path, unit: int | None, seconds: float = 0.0) -> bool:
        child = context.Process(target=_build, args=(str(out), unit, seconds))
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        return child.exitcode == 0

    assert run(tmp_path / "whole", None)
    expected, out = _files(tmp_path / "whole"), tmp_path / "killed"
    units, rng = len(Checkpoint.open(TINY).specs), random.Random(21)
    finished: list[bool] = []
    for kill in range(KILLS):
        finished.append(run(out, rng.randrange(units * 3 // 4), rng.uniform(0, 0.5)))
        if finished[-1] or kill % KILLS_PER_BUILD == KILLS_PER_BUILD - 1:
            assert run(out, None)
            assert _files(out) == expected
            out.rename(tmp_path / f"done{kill}")
    assert sum(finished) <= KILLS // 2  # else the kills came too late to mean anything
