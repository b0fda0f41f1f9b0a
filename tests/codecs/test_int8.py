"""int8 against bitsandbytes: the same bytes, and stored parts that Int8Params loads."""

import pytest
import torch
from codec_weights import decoded, encoded, quality_of, same_bytes, snr_db, spec_of, unit_of, weight

from bagel_compress.codecs import int8
from bagel_compress.codecs.grid import Curvature
from bagel_compress.codecs.int8 import HALF_MAX, PER_127, Int8
from bagel_compress.errors import CodecError

bnb = pytest.importorskip("bitsandbytes")

dialects = pytest.mark.parametrize("dialect", ["bitsandbytes", "compressed-tensors"])
SHAPES = [(64, 64), (7, 33), (1, 1), (3, 1), (300, 250), (129, 4096)]


def assert_equal_bitsandbytes(tensor: torch.Tensor) -> None:
    codes, scb, _ = bnb.functional.int8_vectorwise_quant(tensor.half())
    ours = encoded(Int8(), tensor)
    assert same_bytes(ours["w.weight"], codes)
    assert same_bytes(ours["w.SCB"], scb)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_equal_bitsandbytes(shape: tuple[int, int]) -> None:
    assert_equal_bitsandbytes(weight(*shape))


def test_bytes_equal_bitsandbytes_at_every_magnitude() -> None:
    """Every bf16 magnitude that fp16 holds as a row's absmax, fp16's subnormals, its underflow and zero included."""
    top = (torch.arange(0, 0x4780, dtype=torch.int32) << 16).view(torch.float32)
    row = torch.rand(len(top), 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    row[:, 7] = -1
    assert_equal_bitsandbytes((row * top[:, None]).bfloat16())


def test_decode_equals_bitsandbytes() -> None:
    tensor = weight(129, 512)
    parts = encoded(Int8(), tensor)
    theirs = torch.ops.bitsandbytes.int8_vectorwise_dequant(parts["w.weight"], parts["w.SCB"]).bfloat16()
    assert same_bytes(decoded(Int8(), tensor), theirs)


def test_bitsandbytes_reloads_without_requantising() -> None:
    tensor, x = weight(96, 128), weight(5, 128, seed=3, scale=1.0)
    reference = bnb.nn.Linear8bitLt(128, 96, bias=False, has_fp16_weights=False, threshold=0.0)
    reference.weight = bnb.nn.Int8Params(tensor.clone(), requires_grad=False, has_fp16_weights=False)
    reference = reference.to("cpu")
    parts = encoded(Int8(), tensor)
    module = bnb.nn.Linear8bitLt(128, 96, bias=False, has_fp16_weights=False, threshold=0.0, device="meta")
    module.weight = bnb.nn.Int8Params(
        parts["w.weight"], requires_grad=False, has_fp16_weights=False, CB=parts["w.weight"], SCB=parts["w.SCB"]
    )
    assert torch.equal(module(x), reference(x))
    expected = torch.nn.functional.linear(x, decoded(Int8(), tensor))
    assert torch.linalg.vector_norm(module(x) - expected) < 0.02 * torch.linalg.vector_norm(expected)  # x goes to int8


def test_a_state_dict_of_bitsandbytes_is_our_parts() -> None:
    tensor = weight(32, 64)
    module = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    module.weight = bnb.nn.Int8Params(tensor.clone(), requires_grad=False, has_fp16_weights=False)
    theirs = {f"w.{k}": v for k, v in module.to("cpu").state_dict().items()}
    ours = encoded(Int8(), tensor)
    assert ours.keys() == theirs.keys()
    assert all(same_bytes(ours[name], theirs[name]) for name in ours)


def test_weights_over_the_range_of_fp16_are_refused() -> None:
    tensor = weight(4, 8)
    tensor[2, 3] = -65536.0
    with pytest.raises(CodecError, match=r"w\.weight.*65504"):
        encoded(Int8(), tensor)
    tensor[2, 3] = -65280.0  # the last bf16 below
    assert_equal_bitsandbytes(tensor)


@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_quality_is_that_of_the_decoded_weights(scale: str) -> None:
    codec, tensor = Int8(scale=scale), weight(256, 512)
    assert quality_of(codec, tensor).snr_db == pytest.approx(snr_db(tensor, decoded(codec, tensor)), abs=1e-4)


def test_searched_scales_lose_less_in_every_row() -> None:
    tensor = weight(256, 2048)
    errors = [(tensor.float() - decoded(Int8(scale=s), tensor).float()).square().sum(1) for s in ("absmax", "mse")]
    assert (errors[1] <= errors[0] * 1.00001).all()
    assert errors[1].sum() < errors[0].sum()


def test_another_weight_format_is_refused() -> None:
    tensor = weight(4, 8)
    parts = encoded(Int8(), tensor) | {"w.weight_format": torch.tensor(1, dtype=torch.uint8)}
    with pytest.raises(CodecError, match="weight_format"):
        Int8().decode(unit_of(tensor), parts)


def test_bytes_that_do_not_decode_to_the_weights_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One flipped bit in the codes of a row."""
    from bagel_compress.codecs.kernels import rows_kernels

    whole = rows_kernels.int8_rows

    def faulty(words, scales, codes, sums):  # type: ignore[no-untyped-def]
        whole(words, scales, codes, sums)
        codes[0, 5] ^= 0x20
        rows_kernels.int8_measure(words[0], scales[0], codes[0], sums[0])

    monkeypatch.setattr(rows_kernels, "int8_rows", faulty)
    with pytest.raises(CodecError, match=r"w\.weight.*do not decode"):
        encoded(Int8(), weight(64, 64))


@dialects
def test_an_export_gets_the_scale_of_one_code(dialect: str) -> None:
    """bitsandbytes stores 127 times as much; the row of zeros has 0 there."""
    codec, tensor = Int8.model_validate({"dialect": dialect}), weight(5, 32)
    tensor[3] = 0
    parts = encoded(codec, tensor)
    given = codec.onnx_codes(spec_of(tensor), parts)
    scb = encoded(Int8(), tensor)["w.SCB"]
    assert torch.equal(given.scale, scb * torch.tensor(PER_127))
    assert torch.equal(torch.from_numpy(given.codes), parts["w.weight"])
    assert given.scale.shape == (5,)


@dialects
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_the_grid_has_the_scales_that_the_codec_says(scale: str, dialect: str) -> None:
    tensor = weight(6, 512).float()
    tensor[2], tensor[4, 0] = 0, HALF_MAX
    grid = Int8.model_validate({"dialect": dialect, "scale": scale}).grid(spec_of(tensor.bfloat16()))
    found = grid.scales(tensor, Curvature(torch.ones(512), torch.ones(512)))
    absmax = tensor.abs().amax(1, keepdim=True)
    absmax[2] = 1
    plain = absmax if dialect == "bitsandbytes" else absmax * PER_127
    if scale == "absmax":
        assert torch.equal(found.values, plain)
    else:
        assert bool((found.values <= 1.05 * plain).all())
        assert not torch.equal(found.values, plain)
    assert float(grid.factor) == (PER_127 if dialect == "bitsandbytes" else 1.0)
    if dialect == "bitsandbytes":
        assert torch.equal(found.stored["w.SCB"], found.values[:, 0])
        assert found.stored["w.weight_format"].item() == 0
    else:
        assert torch.equal(found.stored["w.weight_scale"], found.values)
    tensor[4, 0] = 1.0
    assert float(grid.scales(tensor, Curvature(torch.ones(512), torch.ones(512))).values[2]) <= 1.05
    tensor[4, 0] = 65536.0
    with pytest.raises(CodecError, match="over 65504"):
        grid.scales(tensor, Curvature(torch.ones(512), torch.ones(512)))


@dialects
def test_rows_are_decoded_in_pieces(dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, tensor = Int8.model_validate({"dialect": dialect}), weight(7, 40)
    whole = decoded(codec, tensor)
    for elements in (1, 80, 100):  # one row, two, two
        monkeypatch.setattr(int8, "DECODE_ELEMENTS", elements)
        assert same_bytes(decoded(codec, tensor), whole)
