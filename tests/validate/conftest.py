"""A reference of the tiny checkpoint, and traces of a few short cases."""

import pytest
import torch
from tiny_suite import CASES, PICTURES, TINY

from bagel.sampler import Sampler
from bagel_compress.parity.record import record_cases


@pytest.fixture(scope="session")
def reference():
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    return Sampler.from_dir(TINY, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def trace_file(reference, tmp_path_factory):
    out = tmp_path_factory.mktemp("traces") / "short.safetensors"
    return record_cases(reference, "tiny", "digest-of-tiny", [(c, PICTURES) for c in CASES], out)
