"""Shared by all tests: the tiny golden checkpoint and models loaded from it once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from bagel.sampler import Sampler

torch.set_num_threads(1)  # tiny models: waking more threads costs more than they do

GOLDEN = Path(__file__).parent / "data" / "golden"
TINY = GOLDEN / "checkpoint"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def tiny() -> Path:
    return TINY


@pytest.fixture(scope="session")
def fp32() -> Sampler:
    """The tiny model in fp32. Shared: do not change it."""
    return Sampler.from_dir(TINY, dtype=torch.float32)


@pytest.fixture(scope="session")
def bf16() -> Sampler:
    """The tiny model in bf16. Shared: do not change it."""
    return Sampler.from_dir(TINY)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit code, stdout, stderr)."""
    from bagel_compress.cli import main

    def run(*argv: object) -> tuple[int, str, str]:
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
