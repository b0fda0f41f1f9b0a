"""A visit to a GPU machine is rehearsed without one: every part runs, and says what it left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("suite", "kernels", "decoders", "draw")


def day(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_day.py"), *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = day("--dry-run", "--out", str(tmp_path), "--recipes", "df11")
    assert done.returncode == 0, done.stdout + done.stderr
    receipts = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in PARTS}
    assert all(receipt["passed"] and receipt["dry_run"] for receipt in receipts.values())
    assert receipts["kernels"]["figures"]["decoders compared"] == 3  # df11, and ecq at two rates, in Triton
    assert "nf4's decoder on CUDA" in receipts["kernels"]["skipped"]
    assert receipts["draw"]["figures"]["df11"]["pass"]["floor"] > 0


@pytest.mark.slow
def test_a_rehearsal_draws_with_every_recipe_of_a_visit(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = day("draw", "--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "draw.json").read_text())["figures"]
    assert set(figures) == {"bf16-32gb", "fp8-24gb", "int8-24gb", "nf4-nearest", "df11"}
    assert all(found["pass"]["floor"] > 0 and found["bytes"] > 0 for found in figures.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_says_so_and_a_part_must_exist(tmp_path: Path) -> None:
    done = day("kernels", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())
    assert "there is no part lunch" in day("lunch").stderr
