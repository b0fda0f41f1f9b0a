"""Batches: three fine-tunes by two recipes, killed in the middle, in several processes, on Ray: the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bagel_compress.errors import MissingExtraError, RecipeError
from bagel_compress.io import lock as lock_file
from bagel_compress.io.digests import sha256_file
from bagel_compress.publishing.batch import BatchFile, run_batch, summary

RECIPES = ["nf4", "raw"]


def variant(folder: Path, tiny: Path, seed: int) -> None:
    """A fine-tune: the tiny checkpoint with one matrix changed."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "ema.safetensors")
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(seed))
    tensors[name] = tensors[name] + 0.01 * noise.to(tensors[name].dtype)
    save_file(tensors, folder / "ema.safetensors", {"format": "pt"})


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    root = tmp_path_factory.mktemp("variants")
    for seed, name in enumerate("abc"):
        variant(root / name, tiny, seed)
    return root


@pytest.fixture
def file(tmp_path: Path, variants: Path) -> Path:
    sources = [{"name": name, "path": str(variants / name)} for name in "abc"]
    path = tmp_path / "builds.yaml"
    path.write_text(yaml.safe_dump({"out": "out", "sources": sources, "recipes": RECIPES}))
    return path


def digests(out: Path) -> dict[str, str]:
    """Every file of every artifact."""
    return {str(p.relative_to(out)): sha256_file(p) for p in sorted(out.rglob("*")) if p.is_file() and p.parent != out}


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory, variants: Path) -> dict[str, str]:
    """What an undisturbed run makes."""
    root = tmp_path_factory.mktemp("expected")
    sources = [{"name": name, "path": str(variants / name)} for name in "abc"]
    (root / "builds.yaml").write_text(yaml.safe_dump({"out": "out", "sources": sources, "recipes": RECIPES}))
    results = run_batch(BatchFile.load(root / "builds.yaml"))
    assert [r.error for r in results] == [None] * 6
    return digests(root / "out")


def test_six_builds_and_a_summary(
    file: Path, expected: dict[str, str], cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = cli("batch", file)
    assert code == 0
    assert out.count("built") == 6
    assert out.rstrip().endswith("6 of 6 done")
    assert digests(file.parent / "out") == expected
    assert len({row["artifact"] for row in json.loads((file.parent / "out" / "batch.json").read_text())}) == 6
    assert cli("batch", file)[1].count("exists") == 6


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_in_the_middle_and_resumed(file: Path, expected: dict[str, str], jobs: int) -> None:
    command = [sys.executable, "-m", "bagel_compress", "batch", str(file), "--jobs", str(jobs)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # calibrated rounding sums in the order of its threads
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=alone)
    out = file.parent / "out"
    deadline = time.monotonic() + 90
    while not list(out.glob("*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    finished = len(list(out.glob("*/manifest.json")))
    assert 1 <= finished < 6
    wait_for_workers(out)
    again = subprocess.run(command, capture_output=True, text=True, timeout=240, env=alone)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("  exists") >= finished
    assert digests(out) == expected


def wait_for_workers(out: Path) -> None:
    """Until the workers have noticed that their parent is gone, which takes a busy machine a while."""
    time.sleep(0.5)
    deadline = time.monotonic() + 60
    while any(is_held(lock) for lock in out.glob("*/.build/lock")):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def is_held(lock: Path) -> bool:
    holder = json.loads(lock.read_text())
    return lock_file.is_alive(holder["pid"], holder["started"])


def test_one_failure_does_not_stop_the_others(file: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    data = yaml.safe_load(file.read_text())
    data["sources"][1]["path"] = "nowhere"
    file.write_text(yaml.safe_dump(data))
    code, out, _ = cli("batch", file)
    assert code == 1
    assert out.count("FAILED: nowhere does not exist") == 2
    assert "4 of 6 done" in out


@pytest.mark.slow
def test_ray_gives_the_same_bytes(file: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    results = run_batch(BatchFile.load(file), processes=2, executor="ray")
    assert [r.error for r in results] == [None] * 6
    assert digests(file.parent / "out") == expected


def test_without_ray(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"bagel-compress\[ray\]"):
        run_batch(BatchFile.load(file), executor="ray")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources"),
        ({"recipes": ["nf4", "nf4"]}, "two of the recipes are called 'nf4'"),
        ({"recipes": ["unheard-of"]}, "recipe unheard-of does not exist"),
        ({"sources": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, "two sources are called 'a'"),
        ({"sources": [{"name": "../a", "path": "x"}]}, "source 1: name: string should match pattern"),
        ({"extra": 1}, "extra"),
    ],
)
def test_bad_files(file: Path, change: dict[str, object], message: str) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises(RecipeError, match=message):
        BatchFile.load(file).jobs()


def test_summary_of_failures() -> None:
    from bagel_compress.publishing.batch import BatchResult

    assert summary([BatchResult("a--nf4", "out", error="no.")]).splitlines()[-1] == "0 of 1 done"
