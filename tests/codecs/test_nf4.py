"""nf4 against bitsandbytes: the same bytes, and stored parts that bitsandbytes loads without quantising again."""

import json
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from codec_weights import decoded, encoded, quality_of, same_bytes, snr_db, unit_of, weight

from bagel_compress.codecs.nf4 import STATE, Nf4
from bagel_compress.errors import CodecError

bnb = pytest.importorskip("bitsandbytes")

SHAPES = [(64, 64), (32, 96), (7, 33), (1, 1), (3, 1), (5, 128), (300, 250), (129, 4096)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """bitsandbytes' nested offset is a torch mean, whose last bit depends on the number of threads; ours is one's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_bitsandbytes(tensor: torch.Tensor, double_quant: bool) -> dict[str, torch.Tensor]:
    packed, state = bnb.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=double_quant)
    return {"w.weight": packed} | {f"w.weight.{k}": v for k, v in state.as_dict(packed=True).items()}


def assert_same_parts(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, part in theirs.items():
        if name.endswith(STATE):
            assert bytes(ours[name].tolist()).rstrip(b" ") == bytes(part.tolist())
        else:
            assert same_bytes(ours[name], part), name


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_equal_bitsandbytes(shape: tuple[int, int], double_quant: bool) -> None:
    tensor = weight(*shape)
    ours = encoded(Nf4(double_quant=double_quant), tensor)
    assert_same_parts(ours, by_bitsandbytes(tensor, double_quant))


@pytest.mark.parametrize("double_quant", [False, True])
def test_bytes_equal_bitsandbytes_at_every_magnitude(double_quant: bool) -> None:
    """One block for each exponent and a few mantissas of absmax, with zero, subnormal and huge blocks."""
    end = 0x6000 if double_quant else 0x7F80  # a mean of larger ones overflows, in bitsandbytes too
    words = torch.arange(0, end, 37, dtype=torch.int32)
    top = (words << 16).view(torch.float32)
    noise = torch.rand(len(words), 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise[:, 0] = 1
    tensor = (noise * top[:, None]).bfloat16()
    ours = encoded(Nf4(double_quant=double_quant), tensor)
    assert_same_parts(ours, by_bitsandbytes(tensor, double_quant))


@pytest.mark.slow
def test_codes_of_every_word_under_every_absmax() -> None:
    """All bf16 weights up to an absmax, for each of the 128 mantissas that the threshold table knows."""
    for mantissa in range(128):
        top = 0x3F80 + mantissa
        words = torch.arange(top + 1, dtype=torch.int32)
        words = torch.cat([words, words + 0x8000])
        rows = -(-len(words) // 63)
        block = torch.full((rows, 64), top, dtype=torch.int32)
        padded = torch.cat([words, words.new_zeros(rows * 63 - len(words))]).reshape(rows, 63)
        block[:, 1:] = padded
        tensor = (block << 16).view(torch.float32).bfloat16()
        assert_same_parts(encoded(Nf4(), tensor), by_bitsandbytes(tensor, False))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_equals_bitsandbytes(
    shape: tuple[int, int], double_quant: bool, bnb_decoded: Callable[..., torch.Tensor]
) -> None:
    tensor = weight(*shape)
    unit, codec = unit_of(tensor), Nf4(double_quant=double_quant)
    parts = encoded(codec, tensor)
    packed, state = bnb.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=double_quant)
    assert torch.equal(codec.decode(unit, parts)["w.weight"], bnb_decoded(packed, state))


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_reloads_without_requantising(double_quant: bool) -> None:
    tensor, bias = weight(96, 128), weight(1, 96, seed=2)[0]
    unit, codec = unit_of(tensor), Nf4(double_quant=double_quant)
    parts = encoded(codec, tensor)
    module = _linear4bit(parts, bias, 128, 96)
    x = weight(5, 128, seed=3, scale=1.0)
    expected = torch.nn.functional.linear(x, codec.decode(unit, parts)["w.weight"], bias)
    assert torch.equal(module.train()(x), expected)


def test_an_eval_forward_of_bitsandbytes_leaves_stored_parts_alone() -> None:
    """Its eval forward on some CPUs repacks the weight in place; our bytes must not be what it repacks."""
    tensor = weight(64, 128)
    parts = encoded(Nf4(), tensor)
    before = {name: part.clone() for name, part in parts.items()}
    copies = {name: part.clone() for name, part in parts.items()}
    _linear4bit(copies, weight(1, 64, seed=2)[0], 128, 64).eval()(weight(3, 128, seed=3))
    assert_same_parts(parts, before)
    assert_same_parts(encoded(Nf4(), tensor), before)


def _linear4bit(parts: dict[str, torch.Tensor], bias: torch.Tensor, k: int, n: int) -> torch.nn.Module:
    module = bnb.nn.Linear4bit(k, n, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    statistics = {name.removeprefix("w.weight."): v for name, v in parts.items() if name != "w.weight"}
    module.weight = bnb.nn.Params4bit.from_prequantized(parts["w.weight"], statistics, device="cpu", module=module)
    module.bias = torch.nn.Parameter(bias, requires_grad=False)
    return module


@pytest.mark.parametrize("double_quant", [False, True])
def test_plan_sizes_hold_whatever_the_offset(double_quant: bool) -> None:
    codec = Nf4(double_quant=double_quant)
    for scale in (1e-38, 1e-7, 0.02, 1.0, 1e36):
        tensor = (torch.ones(8, 64) * scale).bfloat16()
        parts = encoded(codec, tensor)
        assert sum(p.nbytes for p in parts.values()) == codec.nbytes(unit_of(tensor))
        json.loads(bytes(parts[f"w.weight.{STATE}"].tolist()))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_quality_is_that_of_the_decoded_weights(scale: str, double_quant: bool) -> None:
    tensor = weight(256, 512)
    codec = Nf4(scale=scale, double_quant=double_quant)
    # the rounding of decode to bf16 is not counted
    assert quality_of(codec, tensor).snr_db == pytest.approx(snr_db(tensor, decoded(codec, tensor)), abs=0.01)


def test_searched_scales_lose_less_in_every_block() -> None:
    tensor = weight(256, 512)
    errors = {}
    for scale in ("absmax", "mse"):
        parts = encoded(Nf4(scale=scale), tensor)
        codes = torch.stack([parts["w.weight"] >> 4, parts["w.weight"] & 15], 1).reshape(-1, 64).long()
        decoded = parts["w.weight.quant_map"][codes] * parts["w.weight.absmax"][:, None]  # fp32: before decode rounds
        errors[scale] = (tensor.float().reshape(-1, 64) - decoded).square().sum(1)
    assert errors["mse"].sum() < 0.95 * errors["absmax"].sum()
    assert (errors["mse"] <= errors["absmax"] * 1.00001).all()


def test_double_quantisation_refuses_what_it_would_overflow() -> None:
    tensor = torch.full((16, 64), 3e38).bfloat16()
    with pytest.raises(CodecError, match=r"w\.weight.*double_quant"):
        encoded(Nf4(double_quant=True), tensor)


def test_bytes_that_do_not_decode_to_the_weights_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from bagel_compress.codecs.kernels import nf4_kernels

    wrong = nf4_kernels.thresholds().copy()
    wrong[:, 12] += 96  # three quarters of an octave: some weights get a code too low
    monkeypatch.setattr(nf4_kernels, "thresholds", lambda: wrong)
    with pytest.raises(CodecError, match=r"w\.weight.*do not decode"):
        encoded(Nf4(), weight(64, 64))


def test_damaged_state_is_refused() -> None:
    tensor = weight(8, 64)
    unit = unit_of(tensor)
    parts = encoded(Nf4(), tensor)
    name = f"w.weight.{STATE}"
    for text in (b"{", b"[]", b"null", b"[" * 50, json.dumps({"quant_type": "fp4"}).encode()):
        damaged = parts | {name: torch.tensor(list(text.ljust(len(parts[name]))), dtype=torch.uint8)}
        with pytest.raises(CodecError, match=r"w\.weight"):
            Nf4().decode(unit, damaged)


@pytest.mark.parametrize(
    ("absmax", "searched"),
    [
        (2.0**-55, True),  # of the least magnitude whose squares are searched
        (2.0**-55 * (1 - 2.0**-8), False),
        (2.0**61, True),  # of the largest
        (2.0**61 * (1 + 2.0**-7), False),
    ],
)
def test_scales_are_searched_where_squares_are_normal_numbers(absmax: float, searched: bool) -> None:
    """Elsewhere absmax stays. Inside, a block a power of two larger has a scale that power larger, to the bit."""
    tensor = weight(1, 64, seed=7)
    tensor[0, 5] = tensor.abs().max() * 4  # far out: a smaller scale is better
    tensor = (tensor.float() / tensor[0, 5].float() * absmax).bfloat16()
    assert float(tensor.abs().max()) == absmax
    found = encoded(Nf4(scale="mse"), tensor)["w.weight.absmax"]
    same = encoded(Nf4(scale="mse"), (tensor.double() * 2.0 ** -round(math.log2(absmax))).bfloat16())
    expected = same["w.weight.absmax"] * 2.0 ** round(math.log2(absmax))
    assert torch.equal(found, expected if searched else torch.tensor([absmax]))
    assert not torch.equal(expected, torch.tensor([absmax]))
