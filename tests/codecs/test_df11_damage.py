"""Damaged DF11 units: a CodecError that names the unit, never a hang, a crash or a write outside the buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bagel_compress.codecs import DF11
from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.df11.decode import check_parts, decode_into
from bagel_compress.codecs.df11.layout import SUFFIXES
from bagel_compress.errors import CodecError
from bagel_compress.io.tensor_spec import TensorSpec

CODEC = DF11()
GUARD = 4096


def stored(seed: int, shape: tuple[int, int], scale: float) -> tuple[Unit, torch.Tensor, dict[str, torch.Tensor]]:
    rng = np.random.default_rng(seed)
    weights = torch.from_numpy(rng.normal(0, 0.02, shape) * np.exp(rng.normal(0, scale, (shape[0], 1)))).bfloat16()
    unit = Unit("a.layer", (TensorSpec("BF16", shape, "a.layer.weight"),))
    return unit, weights, CODEC.encode(unit, {"a.layer.weight": weights})


# One block, several blocks, and a book of several tables.
UNITS = [stored(0, (30, 40), 0.3), stored(1, (150, 300), 0.3), stored(2, (200, 200), 6.0)]


def attempt(unit: Unit, parts: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """What the decoder gives, or None if it refused; checks that nothing behind the buffer was touched."""
    out = torch.full((unit.numel + GUARD,), 3.0, dtype=torch.bfloat16)
    flat, refusal = None, "a.layer"
    try:
        flat = decode_into(check_parts(unit, parts), out)
    except CodecError as error:
        refusal = str(error)
    assert "a.layer" in refusal
    assert (out[unit.numel :] == 3.0).all()
    return flat


def test_sound_units_decode() -> None:
    for unit, weights, parts in UNITS:
        assert torch.equal(attempt(unit, parts).view(torch.int16), weights.view(-1).view(torch.int16))  # type: ignore[union-attr]
    assert len(UNITS[2][2]["a.layer.luts"]) > 3


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, len(UNITS) - 1),
    st.sampled_from(SUFFIXES),
    st.sampled_from(["flip", "set", "cut", "extend", "shuffle"]),
    st.integers(0, 1 << 30),
    st.integers(0, 255),
)
def test_damaged_units_never_hang_or_escape(which: int, suffix: str, how: str, at: int, value: int) -> None:
    unit, weights, parts = UNITS[which]
    name = f"a.layer.{suffix}"
    damaged = damage(parts[name], how, at, value)
    flat = attempt(unit, parts | {name: damaged})
    same = damaged.shape == parts[name].shape and torch.equal(damaged, parts[name])
    if same or suffix in ("gaps", "output_positions", "split_positions"):
        assert (flat is not None) == same, "an index that does not fit the stream went unnoticed"
    if damaged.shape != parts[name].shape and suffix != "encoded_exponent":
        assert flat is None
    if flat is not None and suffix not in ("sign_mantissa", "encoded_exponent"):
        assert torch.equal(flat.view(torch.int16), weights.view(-1).view(torch.int16))


def damage(tensor: torch.Tensor, how: str, at: int, value: int) -> torch.Tensor:
    flat = tensor.clone().view(-1)
    if how == "cut":
        return flat[: at % (len(flat) + 1)] if tensor.dim() == 1 else tensor[: at % (len(tensor) + 1)]
    if how == "extend":
        more = flat.new_full((1 + at % 700,), value)
        return torch.cat([flat, more]) if tensor.dim() == 1 else torch.cat([tensor, tensor[:1]])
    if len(flat) == 0:
        return tensor
    if how == "flip":
        flat[at % len(flat)] ^= 1 << (value % 8)
    elif how == "set":
        flat[at % len(flat)] = value
    else:
        flat = flat[torch.from_numpy(np.random.default_rng(at).permutation(len(flat)))]
    return flat.view(tensor.shape)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_part(suffix: str) -> None:
    unit, _, parts = UNITS[0]
    with pytest.raises(CodecError, match=rf"a\.layer: {suffix} is missing"):
        CODEC.decode(unit, {name: part for name, part in parts.items() if not name.endswith(suffix)})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_part_of_another_dtype(suffix: str) -> None:
    unit, _, parts = UNITS[0]
    with pytest.raises(CodecError, match=rf"a\.layer: {suffix} is torch\.float32"):
        CODEC.decode(unit, parts | {f"a.layer.{suffix}": parts[f"a.layer.{suffix}"].float()})


def test_the_tables_of_another_unit() -> None:
    unit, _, parts = UNITS[1]
    with pytest.raises(CodecError, match=r"a\.layer"):
        CODEC.decode(unit, parts | {"a.layer.luts": UNITS[2][2]["a.layer.luts"]})


def test_a_stream_of_noise_ends() -> None:
    unit, _, parts = UNITS[1]
    rng = np.random.default_rng(3)
    for _ in range(200):
        size = parts["a.layer.encoded_exponent"].numel()
        noise = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
        assert attempt(unit, parts | {"a.layer.encoded_exponent": noise}) is None
