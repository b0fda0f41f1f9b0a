"""Shared by all tests: the tiny golden checkpoint and models loaded from it once."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Traced graphs of the tiny model's blocks, for `export`: on disk, where all processes of a run find them."""
    root = tmp_path_factory.getbasetemp()
    return Templates((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "templates")


class Templates(dict[str, bytes]):
    """Also finds and keeps its values as files of a folder. A file is complete when it has its name."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def __contains__(self, key: object) -> bool:
        return (self._folder / str(key)).exists()

    def __getitem__(self, key: str) -> bytes:
        return (self._folder / key).read_bytes()

    def __setitem__(self, key: str, value: bytes) -> None:
        partial = self._folder / f"{key}.{os.getpid()}"
        partial.write_bytes(value)
        partial.replace(self._folder / key)


@pytest.fixture
def small_cases(tmp_path: Path) -> Path:
    """A folder with one small case of each task: what a verdict asks for, in a second."""
    from PIL import Image

    folder = tmp_path / "cases"
    folder.mkdir()
    Image.linear_gradient("L").resize((56, 56)).convert("RGB").save(folder / "grey.png")
    for name, text in {
        "draw": "kind: t2i\nturns: [a red cat]\nsize: [32, 32]",
        "edit": "kind: edit\nturns: [{image: grey.png}, blue]",
        "ask": "kind: understand\nturns: [{image: grey.png}, what is it]\ntext: {max_tokens: 4}",
        "think": "kind: t2i\nthink: true\nturns: [a car]\nsize: [32, 32]\ntext: {max_tokens: 4}",
    }.items():
        (folder / f"{name}.yaml").write_text(f"name: {name}\n{text}\nflow: {{num_timesteps: 3}}\n")
    return folder


@pytest.fixture(scope="session")
def bnb_decoded() -> Callable[..., torch.Tensor]:
    """bitsandbytes' own decoding of a 4-bit weight, asked for in rows of one block.

    Version 0.50.2 takes the scales of wrong blocks on CPUs with AVX-512 where rows are not whole blocks; the codes do
    not depend on how the matrix is cut into rows.
    """
    from bitsandbytes.functional import dequantize_4bit

    def decode(packed: torch.Tensor, state: Any) -> torch.Tensor:
        shape, in_blocks = state.shape, copy.copy(state)
        if shape.numel() % state.blocksize == 0:
            in_blocks.shape = torch.Size((shape.numel() // state.blocksize, state.blocksize))
        with torch.compiler.set_stance("force_eager"):  # it compiles its fallback for odd shapes, which takes a minute
            return dequantize_4bit(packed, in_blocks).reshape(shape)

    return decode
