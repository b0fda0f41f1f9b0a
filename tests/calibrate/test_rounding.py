"""Calibrated rounding: one implementation for all grids, checked against the textbook form and against its promises."""

from __future__ import annotations

import pytest
import torch

from bagel_compress.calibrate import loops
from bagel_compress.calibrate.factor import factorise, refit_map
from bagel_compress.calibrate.moments import Moments
from bagel_compress.calibrate.rounding import round_unit, round_weights
from bagel_compress.codecs.base import InMemory, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec, Gptq
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.codecs.grid import Curvature, Packed, block_errors
from bagel_compress.codecs.int4 import Int4
from bagel_compress.codecs.int8 import Int8
from bagel_compress.codecs.nf4 import Nf4
from bagel_compress.errors import CalibrationError, CodecError
from bagel_compress.io.tensor_spec import TensorSpec

ROWS, WIDTH = 130, 192
NAME = "w.weight"
SPEC = TensorSpec("BF16", (ROWS, WIDTH), NAME)
UNIT = Unit(NAME, (SPEC,))
FORMATS = [
    (Nf4, {"double_quant": True}), (Nf4, {}), (Int4, {}), (Int8, {}), (Fp8, {}), (Fp8, {"granularity": "tensor"}),
]  # fmt: skip
CODECS = [make(**fields, scale=scale, rounding="gptq") for make, fields in FORMATS for scale in ("absmax", "mse")]
every = pytest.mark.parametrize("codec", CODECS, ids=str)


def weights() -> torch.Tensor:
    return (torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def inputs(seed: int = 1, count: int = 2000) -> torch.Tensor:
    """Correlated rows: a spectrum that falls as 1/k, and a little of everything."""
    made = torch.Generator().manual_seed(7)
    mix = torch.randn(WIDTH, WIDTH, generator=made) / torch.arange(1, WIDTH + 1)[:, None]
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=drawn) @ mix + 0.02 * torch.randn(count, WIDTH, generator=drawn)


def moments(block: int | None = None) -> Moments:
    found = Moments(WIDTH, block=block)
    found.add(inputs())
    return found


def coded(codec: CalibratedCodec, m: Moments | None = None) -> Packed:
    encoding = round_unit(codec, UNIT, InMemory({NAME: weights()}), m or moments())
    assert isinstance(encoding, Packed)
    return encoding


def output_error(decoded: torch.Tensor, x: torch.Tensor) -> float:
    """Squared relative error of the layer's output."""
    full = x.double() @ weights().double().T
    return float(((x.double() @ decoded.double().T) - full).square().sum() / full.square().sum())


@every
def test_the_error_of_the_output_falls_to_a_quarter_on_rows_never_seen(codec: CalibratedCodec) -> None:
    """A relative error of at most half of nearest's, as squares; with a spectrum of 1/k and all of H."""
    nearest = type(codec).model_validate(codec.model_dump() | {"rounding": "nearest"})
    before = nearest.decode(UNIT, nearest.encode(UNIT, {NAME: weights()}))[NAME]
    after = codec.decode(UNIT, dict(coded(codec).stored))[NAME]
    fresh = inputs(seed=2)
    assert output_error(after, fresh) < 0.25 * output_error(before, fresh)


@every
def test_the_report_is_that_of_the_decoded_weights(codec: CalibratedCodec) -> None:
    encoding = coded(codec)
    assert encoding.rounded is not None
    decoded = codec.decode(UNIT, dict(encoding.stored))[NAME]
    assert encoding.rounded.error == pytest.approx(output_error(decoded, inputs()), rel=0.02)
    assert encoding.rounded.error <= encoding.rounded.nearest
    assert encoding.rounded.rows == 2000
    assert encoding.rounded.damping == 0.01
    noise = (weights().double() - decoded.double()).square().sum()
    assert encoding.quality.noise == pytest.approx(float(noise), rel=1e-4)


@every
def test_names_shapes_and_sizes_are_those_of_the_plan(codec: CalibratedCodec) -> None:
    encoding = coded(codec)
    planned = codec.parts(UNIT)
    assert encoding.parts == planned
    for name, part in planned.items():
        assert tuple(encoding.stored[name].shape) == part.shape
        assert encoding.stored[name].nbytes == part.nbytes
        assert encoding.stored[name].is_contiguous()
    chunks = list(encoding.chunks())
    assert sorted(c.part for c in chunks) == sorted(planned)
    assert all(c.data.nbytes == planned[c.part].nbytes for c in chunks)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("codec", [Nf4(), Int4(), Fp8()], ids=str)
def test_feedback_equals_the_textbook_form(codec: CalibratedCodec, act_order: bool) -> None:
    """GPTQ as its paper has it: columns after the rounded one move by its error times a row of the inverse's factor."""
    grid, w = codec.grid(SPEC), weights().float()
    assert grid is not None
    method = Gptq(act_order=act_order, passes=0)
    m = moments()
    factor = factorise(m.blocks()[0].h, method.damping, act_order)
    upper = torch.linalg.cholesky(torch.linalg.inv(factor.moments.double()), upper=True)
    curvature = Curvature(m.diagonal(), m.diagonal())
    scales = grid.scales(w, curvature)
    left, expected = w.double()[:, factor.order].clone(), torch.empty_like(w)
    for j, column in enumerate(factor.order.tolist()):
        scale = scales.values[:, column // grid.block]
        expected[:, column] = grid.levels.nearest(left[:, j].float() / scale)
        decoded = (expected[:, column] * scale).bfloat16().double()
        left[:, j + 1 :] -= ((left[:, j] - decoded) / upper[j, j])[:, None] * upper[j, j + 1 :]
    levels, _, _ = round_weights(grid, w, m, method)
    same = (levels == expected).all(1)  # fp32 against fp64: where a value lies at a midpoint, all after it may differ
    assert same.double().mean() > 0.9


@every
def test_kernels_and_torch_agree(codec: CalibratedCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, w = codec.grid(SPEC), weights().float()
    assert grid is not None
    assert isinstance(codec.rounding, Gptq)
    levels, _, report = round_weights(grid, w, moments(), codec.rounding)
    monkeypatch.setattr(loops, "on_cpu", lambda tensor: False)
    other, _, other_report = round_weights(grid, w, moments(), codec.rounding)
    assert (levels == other).double().mean() > 0.98  # sums in another order: a flipped code moves the next
    assert report.error == pytest.approx(other_report.error, rel=0.02)


@every
def test_scale_searches_agree_with_torch(codec: CalibratedCodec) -> None:
    from bagel_compress.codecs.grid import error_of_blocks

    grid, w, m = codec.grid(SPEC), weights().float(), moments()
    assert grid is not None
    scales = grid.scales(w, Curvature(m.diagonal(), m.diagonal())).values
    torch.testing.assert_close(
        block_errors(grid, w, m.diagonal(), scales), error_of_blocks(grid, w, m.diagonal(), scales), rtol=1e-4, atol=0
    )


@every
def test_no_pass_raises_the_error(codec: CalibratedCodec) -> None:
    errors = []
    for passes in (0, 1, 4):
        encoding = coded(codec.model_copy(update={"rounding": Gptq(passes=passes)}))
        assert encoding.rounded is not None
        errors.append(encoding.rounded.error)
    assert errors[0] >= errors[1] >= errors[2]
    assert codec.format in ("int8", "fp8") or errors[0] > errors[2]  # fine grids are done after the feedback


def test_blocks_of_moments_lose_little_and_stay_below_nearest() -> None:
    codec, x = Nf4(scale="mse", rounding="gptq"), inputs()
    whole = output_error(codec.decode(UNIT, dict(coded(codec).stored))[NAME], x)
    split = output_error(codec.decode(UNIT, dict(coded(codec, moments(block=64)).stored))[NAME], x)
    nearest = Nf4(scale="mse")
    alone = output_error(nearest.decode(UNIT, nearest.encode(UNIT, {NAME: weights()}))[NAME], x)
    assert whole < split < alone


def test_refit_is_the_least_squares_fit_of_the_full_output() -> None:
    full, noise = inputs(), torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(4)) * 0.1
    seen = full + noise
    m = Moments(WIDTH, cross=True)
    m.add(seen, full)
    (block,) = m.blocks()
    assert block.cross is not None
    factor = factorise(block.h, 1e-6, True)
    found = torch.empty(weights().shape)
    found[:, factor.order] = (refit_map(block.h, block.cross, factor) @ weights().float().T).T
    fit = torch.linalg.lstsq(seen.double(), full.double() @ weights().double().T).solution.T
    assert float((found.double() - fit).norm() / fit.norm()) < 1e-3


def test_refit_makes_up_for_the_layers_before() -> None:
    full = inputs()
    seen = full + torch.randn(full.shape, generator=torch.Generator().manual_seed(4)) * 0.1
    m = Moments(WIDTH, cross=True)
    m.add(seen, full)
    expected = full @ weights().float().T
    errors = {}
    for refit in (False, True):
        codec = Nf4(scale="mse", rounding=Gptq(refit=refit))
        decoded = codec.decode(UNIT, dict(coded(codec, m).stored))[NAME].float()
        errors[refit] = float((seen @ decoded.T - expected).square().sum())
    assert errors[True] < 0.8 * errors[False]


def test_bytes_do_not_depend_on_threads() -> None:
    before, results, m = torch.get_num_threads(), [], moments()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(coded(Nf4(scale="mse", rounding="gptq"), m).stored[NAME])
    finally:
        torch.set_num_threads(before)
    assert (results[0] == results[1]).double().mean() > 0.98  # matrix products add in another order
    again = coded(Nf4(scale="mse", rounding="gptq"), m).stored[NAME]
    assert torch.equal(again, coded(Nf4(scale="mse", rounding="gptq"), m).stored[NAME])


def test_damping_grows_where_moments_have_no_factors() -> None:
    h = torch.eye(8)
    h[0, 1] = h[1, 0] = 1.05  # an eigenvalue of -0.05
    factor = factorise(h, 0.01, False)
    assert factor.damping == pytest.approx(0.16)
    torch.testing.assert_close((factor.unit * factor.conditional) @ factor.unit.T, factor.moments)


def test_moments_that_no_damping_saves_are_an_error() -> None:
    h = torch.eye(8)
    h[0, 1] = h[1, 0] = 5.0
    with pytest.raises(CalibrationError, match="no Cholesky factor"):
        factorise(h, 0.01, False)


def test_weights_of_inputs_that_are_always_zero_are_rounded_alone() -> None:
    x = inputs()
    x[:, 10:20] = 0
    m = Moments(WIDTH)
    m.add(x)
    codec = Int8(rounding="gptq")
    decoded = codec.decode(UNIT, dict(coded(codec, m).stored))[NAME]
    step = weights().float().abs().amax(1, keepdim=True) / 127
    assert ((decoded.float() - weights().float()).abs()[:, 10:20] <= 0.505 * step + 2.0**-9 * step * 127).all()


def test_rows_of_zeros_stay_zero() -> None:
    for codec in CODECS:
        w = weights()
        w[5], w[7, :64] = 0, 0
        encoding = round_unit(codec, UNIT, InMemory({NAME: w}), moments())
        assert isinstance(encoding, Packed)
        decoded = codec.decode(UNIT, dict(encoding.stored))[NAME]
        assert not decoded[5].any() or codec.format == "nf4"  # a double-quantised scale of a zero block is not zero
        assert decoded.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    w = weights()
    w[3, 3] = value
    with pytest.raises(CodecError, match=rf"^{NAME}: holds NaN or Inf"):
        round_unit(Nf4(rounding="gptq"), UNIT, InMemory({NAME: w}), moments())


def test_too_few_rows_are_refused_by_name() -> None:
    m = Moments(WIDTH)
    m.add(inputs(count=WIDTH // 4 - 1))
    with pytest.raises(CalibrationError, match=rf"^{NAME}: .*1 more rows"):
        round_unit(Nf4(rounding="gptq"), UNIT, InMemory({NAME: weights()}), m)


def test_blocks_over_the_ends_of_rows_are_left_to_nearest() -> None:
    w = weights()[:, :100].contiguous()
    unit = Unit(NAME, (TensorSpec("BF16", (ROWS, 100), NAME),))
    m = Moments(100)
    m.add(inputs()[:, :100])
    encoding = round_unit(Nf4(rounding="gptq"), unit, InMemory({NAME: w}), m)
    assert not isinstance(encoding, Packed)
    assert "whole blocks" in encoding.reason


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_opens_calibrated_codes_as_what_decode_gives(double_quant: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    codec = Nf4(double_quant=double_quant, scale="mse", rounding="gptq")
    parts = dict(coded(codec).stored)
    expected = codec.decode(UNIT, parts)[NAME]
    module = bnb.nn.Linear4bit(WIDTH, ROWS, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    statistics = {name.removeprefix(f"{NAME}."): part for name, part in parts.items() if name != NAME}
    module.weight = bnb.nn.Params4bit.from_prequantized(parts[NAME], statistics, device="cpu", module=module)
    x = inputs(seed=5, count=7).bfloat16()
    assert torch.equal(module.train()(x), torch.nn.functional.linear(x, expected))


@every
def test_only_codes_and_scales_differ_from_nearest(codec: CalibratedCodec) -> None:
    nearest = type(codec).model_validate(codec.model_dump() | {"rounding": "nearest"})
    alone, parts = nearest.encode(UNIT, {NAME: weights()}), coded(codec).stored
    assert {n: (p.shape, p.dtype) for n, p in alone.items()} == {n: (p.shape, p.dtype) for n, p in parts.items()}
    same = {name for name in alone if torch.equal(alone[name].view(torch.uint8), parts[name].view(torch.uint8))}
    assert f"{NAME}_shape" in same or codec.format != "int4"
    assert {f"{NAME}.quant_map", f"{NAME}.nested_quant_map"} & alone.keys() <= same


def test_scales_are_searched_for_the_columns_that_count() -> None:
    """Columns of inputs a hundred times as large get their precision; a weight that meets none of them is cut."""
    x = inputs()
    x[:, ::64] *= 100
    m = Moments(WIDTH)
    m.add(x)
    errors = {}
    for scale in ("absmax", "mse"):
        codec = Int4(scale=scale, rounding="gptq")
        errors[scale] = output_error(codec.decode(UNIT, dict(coded(codec, m).stored))[NAME], x)
    assert errors["mse"] < 0.8 * errors["absmax"]
