"""What every codec must do, whatever its format."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from codec_weights import NAME, Whole, decoded, encoded, quality_of, same_bytes, snr_db, unit_of, weight

from bagel_compress.codecs import CODECS
from bagel_compress.codecs.base import Codec, Encoding, Unit
from bagel_compress.errors import CodecError, PlanError
from bagel_compress.io.tensor_spec import TensorSpec

VARIANTS: dict[str, list[dict[str, object]]] = {
    "nf4": [{"double_quant": d, "scale": s} for d in (False, True) for s in ("absmax", "mse")],
    "int8": [{"scale": s} for s in ("absmax", "mse")] + [{"dialect": "compressed-tensors"}],
    **{name: [{"scale": s} for s in ("absmax", "mse")] for name in ("nvfp4", "mxfp4")},
    "int4": [
        {},
        {"scale": "mse"},
        {"group": 64, "scale": "mse"},
        {"group": 128},
        {"group": 64, "symmetric": False},
        {"dialect": "auto-round", "scale": "mse"},
    ],
    "ecq": [{"bits": bits} for bits in (4.13, 7.0)],
    "fp8": [{"granularity": g, "scale": s} for g in ("channel", "tensor") for s in ("absmax", "mse")]
    + [{"granularity": "tensor", "dialect": "vllm"}],
}
ALL = [codec(**variant) for codec in CODECS for variant in VARIANTS.get(codec.name(), [{}])]
LOSSY = [codec for codec in ALL if not codec.lossless]
LEAST_DB = {  # of normal weights
    "nf4": 20.0, "int4": 18.0, "int8": 38.0, "fp8": 31.0, "ecq": 22.5, "nvfp4": 20.0, "mxfp8": 30.0, "mxfp4": 17.5,
}  # fmt: skip
SHAPES = [(1, 1), (1, 7), (3, 1), (7, 33), (5, 64), (64, 64), (130, 250), (130, 256)]

every = pytest.mark.parametrize("codec", ALL, ids=str)
lossy = pytest.mark.parametrize("codec", LOSSY, ids=str)


def weight_that_fits(codec: Codec, *shape: int) -> torch.Tensor:
    """A weight of that shape; the test is skipped where the codec refuses it at plan time, which is an answer too."""
    tensor = weight(*shape)
    try:
        codec.check(unit_of(tensor))
    except PlanError as refusal:
        pytest.skip(f"refused at plan time: {refusal}")
    return tensor


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_keeps_shape_and_dtype(codec: Codec, shape: tuple[int, int]) -> None:
    tensor = weight_that_fits(codec, *shape)
    back = decoded(codec, tensor)
    assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
    if codec.lossless:
        assert same_bytes(back, tensor)


@lossy
def test_the_expected_error_is_the_measured_one(codec: Codec) -> None:
    tensor = torch.randn(32, 3584, generator=torch.Generator().manual_seed(5)).bfloat16()
    error = 10 ** (-snr_db(tensor, decoded(codec, tensor)) / 20)
    assert error == pytest.approx(codec.normal_error, rel=0.05)


@lossy
def test_the_quality_that_is_told_is_that_of_the_decoded_weights(codec: Codec) -> None:
    tensor = weight(130, 256)
    assert quality_of(codec, tensor).snr_db == pytest.approx(snr_db(tensor, decoded(codec, tensor)), abs=0.01)


@every
def test_a_weight_of_zeros_stays_one(codec: Codec) -> None:
    assert not decoded(codec, torch.zeros(64, 256, dtype=torch.bfloat16)).any()


@lossy
def test_normal_weights_keep_their_signal(codec: Codec) -> None:
    tensor = weight(130, 256)
    assert snr_db(tensor, decoded(codec, tensor)) > LEAST_DB[codec.format]


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_what_the_plan_said(codec: Codec, shape: tuple[int, int]) -> None:
    tensor = weight_that_fits(codec, *shape)
    unit = unit_of(tensor)
    parts = encoded(codec, tensor)
    if codec.exact:
        assert codec.nbytes(unit) == sum(p.nbytes for p in parts.values())
        assert {n: p.shape for n, p in codec.parts(unit).items()} == {n: tuple(p.shape) for n, p in parts.items()}
    else:
        assert codec.nbytes(unit) >= sum(p.nbytes for p in parts.values())


@every
def test_every_byte_of_every_part_is_written_once(codec: Codec) -> None:
    encoding = codec.begin(unit_of(tensor := weight(130, 256)), Whole(tensor))
    written = {name: np.zeros(part.nbytes, np.uint8) for name, part in encoding.parts.items()}
    for chunk in encoding.chunks():
        assert chunk.data.dtype == np.uint8
        assert chunk.data.ndim == 1
        written[chunk.part][chunk.start : chunk.start + len(chunk.data)] += 1
    assert all((count == 1).all() for count in written.values())


@lossy
@pytest.mark.parametrize("chunk", [256, 4096])
def test_bytes_do_not_depend_on_the_chunks(codec: Codec, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = weight(130, 256)
    whole = encoded(codec, tensor)
    for module in ("matrix", "nf4", "int4", "int4_search"):
        monkeypatch.setattr(f"bagel_compress.codecs.{module}.CHUNK_ELEMENTS", chunk)
    pieces = encoded(codec, tensor)
    assert all(same_bytes(whole[name], pieces[name]) for name in whole)


@every
def test_bytes_do_not_depend_on_threads(codec: Codec) -> None:
    tensor, before = weight(130, 256), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(encoded(codec, tensor))
    finally:
        torch.set_num_threads(before)
    assert all(same_bytes(results[0][name], other[name]) for other in results[1:] for name in results[0])


@lossy
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 63, -1])
def test_not_finite_weights_are_refused_by_name(codec: Codec, value: float, place: int) -> None:
    tensor = weight(7, 128)
    tensor.view(-1)[place] = value
    with pytest.raises(CodecError, match=rf"{NAME}: .*NaN or Inf"):
        encoded(codec, tensor)


@every
@pytest.mark.parametrize(
    "blank",
    [lambda t: t.zero_(), lambda t: t[3].zero_(), lambda t: t.view(-1)[64:256].zero_(), lambda t: t.mul_(-0.0)],
    ids=["all", "row", "blocks", "negative zero"],
)
def test_zeros_come_back(codec: Codec, blank: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = weight(7, 128)
    blank(tensor)
    back = decoded(codec, tensor)
    assert not back[tensor == 0].any()
    assert back.isfinite().all()


@lossy
def test_huge_and_tiny_weights_stay_finite(codec: Codec) -> None:
    for scale in (1e-40, 1e-30, 1e4):
        tensor = weight(7, 128, scale=scale)
        assert decoded(codec, tensor).isfinite().all()


@lossy
@pytest.mark.parametrize(
    ("dtype", "shape", "name"),
    [
        ("F32", (4, 4), "x.weight"),
        ("F16", (4, 4), "x.weight"),
        ("I8", (4, 4), "x.weight"),
        ("BF16", (4,), "x.weight"),
        ("BF16", (4, 4, 3, 3), "x.weight"),
        ("BF16", (0, 4), "x.weight"),
        ("BF16", (4, 4), "pos_embed"),
    ],
)
def test_what_cannot_be_coded_is_refused_at_plan_time(
    codec: Codec, dtype: str, shape: tuple[int, ...], name: str
) -> None:
    with pytest.raises(PlanError, match=rf"^{name}: codec {codec.format}"):
        codec.check(Unit(name, (TensorSpec(dtype, shape, name),)))


@lossy
def test_a_part_of_another_shape_is_refused(codec: Codec) -> None:
    tensor = weight(8, 128)
    parts = encoded(codec, tensor)
    for name in parts:
        with pytest.raises(CodecError, match="damaged"):
            codec.decode(unit_of(tensor), parts | {name: torch.zeros(3, 5)})
        with pytest.raises(CodecError, match="damaged"):
            codec.decode(unit_of(tensor), {other: part for other, part in parts.items() if other != name})


@pytest.mark.parametrize("codec", [c for c in LOSSY if c.format in VARIANTS], ids=str)
def test_a_source_of_another_dtype_is_refused(codec: Codec) -> None:
    with pytest.raises(CodecError, match=r"w\.weight: expected .* bf16"):
        list(codec.begin(unit_of(weight(8, 128)), Whole(torch.zeros(8, 128))).chunks())


@every
def test_the_codec_is_its_own_record(codec: Codec) -> None:
    """The manifest entry gives the codec back, and the codec is a value."""
    again = type(codec)(**codec.model_dump())
    assert again == codec
    assert hash(again) == hash(codec)


@pytest.mark.parametrize("codec", [codec for codec in LOSSY if codec.exact], ids=str)
def test_an_encoding_that_is_not_run_reads_nothing(codec: Codec) -> None:
    class Closed:
        def read(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
            raise AssertionError("read before the first chunk was asked for")

    encoding: Encoding = codec.begin(unit_of(weight(8, 128)), Closed())
    assert encoding.parts.keys() == codec.parts(unit_of(weight(8, 128))).keys()


@pytest.mark.parametrize("codec", [codec for codec in ALL if codec.stored_as_is], ids=str)
def test_what_is_stored_as_it_is_must_have_its_shape(codec: Codec) -> None:
    tensors = {"a.weight": weight(4, 6), "b.weight": weight(2, 3)}
    unit = Unit("u", tuple(TensorSpec("BF16", tuple(t.shape), name) for name, t in tensors.items()))
    assert {n: same_bytes(t, tensors[n]) for n, t in codec.decode(unit, tensors).items()} == dict.fromkeys(
        tensors, True
    )
    for name, other in (("a.weight", (6, 4)), ("b.weight", (2, 2))):
        with pytest.raises(CodecError, match=rf"^{name}: stored shape .*expected .*damaged"):
            codec.decode(unit, tensors | {name: weight(*other)})


@pytest.mark.parametrize("codec", [c for c in LOSSY if c.format in VARIANTS], ids=str)
@pytest.mark.parametrize("more", [-1, 1])
def test_a_source_that_gives_another_number_of_values_is_refused(codec: Codec, more: int) -> None:
    class Other(Whole):
        def read(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
            return torch.zeros(stop - start + more, dtype=torch.bfloat16)

    with pytest.raises(CodecError, match=r"w\.weight: expected 1024 bf16 values, the source gave 102[35]"):
        list(codec.begin(unit_of(weight(8, 128)), Other(weight(8, 128))).chunks())
