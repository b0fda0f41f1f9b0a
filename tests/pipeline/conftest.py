"""The tiny checkpoint, small recipes, and a way to write variants of the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from pipeline_data import NF4, RAW, TINY, Write
from safetensors.torch import load_file, save_file

from bagel_compress.build.recipe import Recipe
from bagel_compress.source.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    return Checkpoint.open(TINY)


@pytest.fixture(scope="session")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(TINY / "ema.safetensors")


@pytest.fixture
def raw() -> Recipe:
    return Recipe.parse(RAW, "raw.yaml")


@pytest.fixture
def nf4() -> Recipe:
    return Recipe.parse(NF4, "nf4.yaml")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(tensors, folder="name", weights="ema.safetensors"): the tiny folder with other weights."""

    def write_folder(
        weights: Mapping[str, torch.Tensor], folder: str = "variant", file: str = "ema.safetensors", aux: bool = True
    ) -> Path:
        out = tmp_path / folder
        out.mkdir()
        if aux:
            for path in TINY.iterdir():
                if path.name != "ema.safetensors":
                    shutil.copyfile(path, out / path.name)
        save_file(dict(weights), out / file, metadata={"format": "pt"})
        return out

    return write_folder
