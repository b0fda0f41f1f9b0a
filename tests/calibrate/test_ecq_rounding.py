"""ecq with calibrated rounding: the rate is met with the levels that were chosen, and the error is worth it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from bagel_compress.calibrate.moments import Moments
from bagel_compress.calibrate.rounding import round_unit
from bagel_compress.codecs.base import InMemory, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec
from bagel_compress.codecs.ecq import Ecq
from bagel_compress.codecs.ecq.calibrated import column_factors
from bagel_compress.codecs.grid import Curvature
from bagel_compress.codecs.nf4 import Nf4
from bagel_compress.errors import CodecError
from bagel_compress.io.tensor_spec import TensorSpec

ROWS, WIDTH = 256, 512
NAME = "w.weight"
UNIT = Unit(NAME, (TensorSpec("BF16", (ROWS, WIDTH), NAME),))


def inputs(seed: int) -> torch.Tensor:
    """Correlated rows: a spectrum that falls as k^-0.7."""
    made, drawn = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=made) / torch.arange(1, WIDTH + 1)[:, None] ** 0.7
    return torch.randn(3000, WIDTH, generator=drawn) @ mix + 0.02 * torch.randn(3000, WIDTH, generator=drawn)


def weights() -> torch.Tensor:
    return (torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


@pytest.fixture(scope="module")
def moments() -> Moments:
    found = Moments(WIDTH)
    found.add(inputs(1))
    return found


def parts_of(codec: CalibratedCodec, moments: Moments, tensor: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    tensor = weights() if tensor is None else tensor
    encoding = round_unit(codec, UNIT, InMemory({NAME: tensor}), moments)
    parts = {}
    for chunk in encoding.chunks():
        spec = encoding.parts[chunk.part]
        parts[chunk.part] = chunk.data.size == spec.nbytes
    assert all(parts.values())
    return dict(encoding.stored)  # type: ignore[attr-defined]


def output_error(codec: CalibratedCodec, parts: dict[str, torch.Tensor]) -> float:
    """Relative error of the layer's output on rows that the moments have not seen."""
    x = inputs(2).double()
    full = x @ weights().double().T
    return float((x @ codec.decode(UNIT, parts)[NAME].double().T - full).norm() / full.norm())


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("bits", [2.0, 3.0, 4.13, 6.0, 8.0])
def test_the_rate_is_met_with_the_levels_that_were_chosen(bits: float, columns: bool, moments: Moments) -> None:
    parts = parts_of(Ecq(bits=bits, rounding="gptq", columns=columns), moments)
    rate = 8 * sum(part.nbytes for part in parts.values()) / (ROWS * WIDTH)
    assert bits - 0.02 <= rate <= bits
    assert (f"{NAME}.column_steps" in parts) == columns


def test_feedback_is_worth_more_than_a_bit(moments: Moments) -> None:
    """At 3 bits less error than to nearest at 4.13, and at 4.13 less than calibrated NF4."""
    nearest = Ecq(bits=4.13)
    plain = output_error(nearest, nearest.encode(UNIT, {NAME: weights()}))
    nf4 = Nf4(double_quant=True, rounding="gptq")
    three, four = Ecq(bits=3.0, rounding="gptq"), Ecq(bits=4.13, rounding="gptq")
    assert output_error(three, parts_of(three, moments)) < plain
    assert output_error(four, parts_of(four, moments)) < 0.85 * output_error(nf4, parts_of(nf4, moments))


def test_steps_of_columns_do_not_hurt(moments: Moments) -> None:
    plain, columns = (Ecq(bits=4.13, rounding="gptq", columns=c) for c in (False, True))
    assert output_error(columns, parts_of(columns, moments)) < 1.02 * output_error(plain, parts_of(plain, moments))


def test_an_outlier_is_kept_whole(moments: Moments) -> None:
    """10^4 deviations: far beyond 8 bits of code, and not clipped."""
    tensor = weights()
    tensor[5, 9] = 200.0
    codec = Ecq(bits=4.13, rounding="gptq")
    assert float(codec.decode(UNIT, parts_of(codec, moments, tensor))[NAME][5, 9]) == pytest.approx(200.0, rel=0.004)


def test_what_no_integer_counts_is_refused(moments: Moments) -> None:
    tensor = weights()
    tensor[5, 9] = 1e30
    with pytest.raises(CodecError, match=f"{NAME}: holds a weight of .* steps"):
        parts_of(Ecq(bits=4.13, rounding="gptq"), moments, tensor)


def test_steps_of_columns_need_moments() -> None:
    with pytest.raises(ValidationError, match="columns is true with rounding nearest"):
        Ecq(columns=True)


def test_factors_of_columns_are_bounded() -> None:
    found = column_factors(Curvature(torch.ones(4), torch.tensor([1e-30, 1.0, 1.0, 1e30])))
    assert found.tolist() == [4096, 1, 1, 1 / 4096]
