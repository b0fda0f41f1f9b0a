"""What is read for a digest: every byte once, and what else looks at the same blocks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3

from bagel_compress.build.finite import FiniteValues
from bagel_compress.io import digests


@pytest.mark.parametrize("nbytes", [0, 1, digests.BLOCK - 1, digests.BLOCK, digests.BLOCK + 1, 3 * digests.BLOCK])
def test_a_digest_of_some_bytes_of_a_file(tmp_path: Path, nbytes: int) -> None:
    data = np.random.default_rng(0).bytes(nbytes + 5)
    (tmp_path / "x").write_bytes(data)
    also = hashlib.sha256()
    with (tmp_path / "x").open("rb") as file:
        assert digests.blake3_of(file, nbytes, also) == blake3(data[:nbytes]).hexdigest()
        assert also.hexdigest() == hashlib.sha256(data[:nbytes]).hexdigest()
        assert file.read() == data[nbytes:]
    assert digests.blake3_file(tmp_path / "x") == blake3(data).hexdigest()


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_seen_in_any_block(dtype: str, kind: torch.dtype, value: float) -> None:
    for bad in (None, 0, 700, 1999):
        values = torch.full((2000,), torch.finfo(kind).max, dtype=kind)
        if bad is not None:
            values[bad] = value
        seen = FiniteValues(dtype)
        for block in values.view(torch.uint8).split(800):
            seen.update(block.numpy().data)
        assert seen.finite == (bad is None)
