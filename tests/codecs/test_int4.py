"""int4 against compressed-tensors, by its definition, and on what a header or a weight can be."""

from __future__ import annotations

import pytest
import torch

from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.int4 import BLOCK, Int4, unpack
from bagel_compress.errors import CodecError, PlanError
from bagel_compress.io.tensor_spec import TensorSpec

NAME = "language_model.model.layers.0.mlp.up_proj.weight"


def coded(weight: torch.Tensor, codec: Int4) -> tuple[Unit, dict[str, torch.Tensor]]:
    unit = Unit(NAME, (TensorSpec("BF16", tuple(weight.shape), NAME),))
    return unit, codec.encode(unit, {NAME: weight})


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul(0.02).bfloat16()


def test_each_code_is_the_nearest_multiple_of_its_scale() -> None:
    weight = normal(48, 96)
    unit, parts = coded(weight, Int4())
    codes = unpack(parts[f"{NAME}_packed"]).float().unflatten(1, (-1, BLOCK))
    scale = parts[f"{NAME}_scale"].float()[..., None]
    nearest = (weight.float().unflatten(1, (-1, BLOCK)) / scale).round().clamp(-8, 7)
    assert torch.equal(codes, nearest)
    decoded = Int4().decode(unit, parts)[NAME]
    assert torch.equal(decoded, (codes * scale).flatten(1).bfloat16())


def test_compressed_tensors_unpacks_the_same_codes() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    _, parts = coded(normal(24, 160), Int4())
    mine = unpack(parts[f"{NAME}_packed"])
    shape = torch.Size(parts[f"{NAME}_shape"].tolist())
    assert torch.equal(helpers.unpack_from_int32(parts[f"{NAME}_packed"], 4, shape), mine)
    assert torch.equal(helpers.pack_to_int32(mine, 4), parts[f"{NAME}_packed"])


def test_mse_is_never_worse_and_usually_better() -> None:
    weight = normal(64, 256, seed=1)
    errors = []
    for scale in ("absmax", "mse"):
        unit, parts = coded(weight, Int4(scale=scale))
        errors.append((Int4().decode(unit, parts)[NAME].float() - weight.float()).norm())
    assert errors[1] < 0.99 * errors[0]


def test_searched_scales_do_not_shrink_the_weights() -> None:
    """Least squares alone makes every layer's answers 1 % smaller, which adds up over a model."""
    weight = normal(64, 256, seed=2)
    unit, parts = coded(weight, Int4(scale="mse"))
    decoded = Int4().decode(unit, parts)[NAME].float()
    along = float((decoded * weight.float()).sum() / weight.float().square().sum())
    assert abs(along - 1) < 1e-3


@pytest.mark.parametrize("size", [1e-30, 1e25, 3e36])
def test_searched_scales_of_extreme_weights(size: float) -> None:
    weight = (normal(8, 64, seed=3).float() * (size / 0.1)).bfloat16()
    unit, parts = coded(weight, Int4(scale="mse"))
    decoded = Int4().decode(unit, parts)[NAME].double()
    assert float((decoded - weight.double()).norm() / weight.double().norm()) < 0.12


def test_zero_blocks_and_the_largest_numbers_stay_finite() -> None:
    weight = torch.zeros(3, 64, dtype=torch.bfloat16)
    weight[1, :32] = torch.finfo(torch.bfloat16).max
    weight[1, 0] = -torch.finfo(torch.bfloat16).max
    weight[2, 3] = 1e-40
    for codec in (Int4(), Int4(scale="mse")):
        unit, parts = coded(weight, codec)
        decoded = codec.decode(unit, parts)[NAME]
        assert bool(torch.isfinite(decoded).all())
        assert bool((decoded[0] == 0).all())


def test_rows_that_are_no_multiple_of_32_are_a_plan_error() -> None:
    with pytest.raises(PlanError, match=r"up_proj.*multiple of 32 weights, found 48"):
        Int4().check(Unit(NAME, (TensorSpec("BF16", (8, 48), NAME),)))


def test_infinite_weights_and_damaged_parts_are_named() -> None:
    weight = normal(4, 32)
    unit, parts = coded(weight, Int4())
    with pytest.raises(CodecError, match="weight_shape"):
        Int4().decode(unit, parts | {f"{NAME}_shape": torch.tensor([4, 64])})
    weight[2, 2] = float("inf")
    with pytest.raises(CodecError, match="NaN or Inf"):
        coded(weight, Int4())
