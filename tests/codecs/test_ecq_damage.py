"""ecq: whatever is done to the stored parts, decoding gives a weight of the right shape or an error with its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codec_weights import NAME, encoded, unit_of, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_compress.codecs.ecq import Ecq
from bagel_compress.errors import CodecError

TENSOR = weight(5, 1000)
TENSOR[2, 7] = 40.0
UNIT = unit_of(TENSOR)
CODECS = [Ecq(bits=2.5), Ecq(bits=4.13), Ecq(bits=7.0)]
CODED = [encoded(codec, TENSOR) for codec in CODECS]
SUFFIXES = ("stream", "run_bytes", "book", "step")
DTYPES = {"stream": np.uint8, "run_bytes": np.uint16, "book": np.uint16, "step": np.float32}


def decode(parts: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The weight, or None if it was refused by name."""
    try:
        return Ecq().decode(UNIT, parts)[NAME]
    except CodecError as error:
        if NAME in str(error) and "damaged" in str(error):
            return None
        raise


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(
    which=st.integers(0, len(CODED) - 1),
    suffix=st.sampled_from(SUFFIXES),
    seed=st.integers(0, 2**32 - 1),
    how=st.sampled_from(["bits", "bytes", "cut", "longer", "noise", "swap"]),
)
def test_any_damage_ends_in_a_weight_or_an_error(which: int, suffix: str, seed: int, how: str) -> None:
    parts, rng = dict(CODED[which]), np.random.default_rng(seed)
    part = parts[f"{NAME}.{suffix}"]
    raw = part.view(torch.uint8).numpy().copy()
    size = DTYPES[suffix]().itemsize
    if how == "bits":
        for _ in range(rng.integers(1, 4)):
            raw[rng.integers(raw.size)] ^= 1 << rng.integers(8)
    elif how == "bytes":
        first = rng.integers(raw.size)
        raw[first : first + 16] = rng.integers(0, 256, raw[first : first + 16].size)
    elif how == "cut":
        raw = raw[: size * int(rng.integers(raw.size // size))]
    elif how == "longer":
        raw = np.concatenate([raw, rng.integers(0, 256, size * int(rng.integers(1, 40))).astype(np.uint8)])
    elif how == "noise":
        raw = rng.integers(0, 256, raw.size).astype(np.uint8)
    else:
        raw = np.roll(raw, size * int(rng.integers(1, 30)))
    parts[f"{NAME}.{suffix}"] = torch.from_numpy(raw.copy().view(DTYPES[suffix]))
    back = decode(parts)
    assert back is None or (back.shape, back.dtype) == (TENSOR.shape, TENSOR.dtype)


@pytest.mark.parametrize("which", range(len(CODED)))
def test_a_flipped_bit_among_the_symbols_is_noticed(which: int) -> None:
    """Rare flips change a few weights and lead back to the right state at the right bit: at most 1 in 25.

    Those are the business of the manifest's digests.
    """
    parts, unnoticed = CODED[which], 0
    stream = parts[f"{NAME}.stream"].numpy()
    low_bits, size = int(parts[f"{NAME}.book"][0]), int(parts[f"{NAME}.run_bytes"][0])
    tried = [*range(12), *range(8 * (2 + 256 * low_bits), 8 * size, 7)]  # of the first run, which has no escapes
    for bit in tried:
        changed = stream.copy()
        changed[bit >> 3] ^= 1 << (bit & 7)
        unnoticed += decode(parts | {f"{NAME}.stream": torch.from_numpy(changed)}) is not None
    assert unnoticed <= len(tried) / 25


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parts_of_another_weight(suffix: str) -> None:
    other = encoded(Ecq(bits=4.13), weight(5, 1000, seed=1, scale=0.5))
    if suffix == "step":
        return  # nothing in the parts ties the step to the codes; the manifest's digest does
    assert decode(CODED[1] | {f"{NAME}.{suffix}": other[f"{NAME}.{suffix}"]}) is None


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", ["missing", "dtype", "dimensions", "empty"])
def test_parts_that_are_not_there_or_of_another_kind(suffix: str, how: str) -> None:
    name, parts = f"{NAME}.{suffix}", dict(CODED[1])
    part = parts.pop(name)
    if how != "missing":
        parts[name] = {"dtype": part.view(torch.uint8).to(torch.int64), "dimensions": part[None], "empty": part[:0]}[
            how
        ]
    assert decode(parts) is None


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_that_is_none(step: float) -> None:
    assert decode(CODED[1] | {f"{NAME}.step": torch.tensor([step])}) is None


@pytest.mark.parametrize("entries", [(), (0, 127, 0), (5, 127, 0, 4096), (0, 254, 0, 2048, 2048), (0, 127, 0, 4095)])
def test_books_that_are_none(entries: tuple[int, ...]) -> None:
    book = torch.tensor(entries, dtype=torch.int32).to(torch.uint16)
    assert decode(CODED[1] | {f"{NAME}.book": book}) is None
