"""Run-time linears: on CPU they are decode-and-multiply, to the bit; their kernels' arithmetic is near it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from codec_weights import NAME, decoded, encoded, spec_of, weight
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from bagel_compress.codecs import int8_linear, nf4_linear
from bagel_compress.codecs.base import Codec
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.codecs.int4 import Int4
from bagel_compress.codecs.int8 import Int8
from bagel_compress.codecs.linears import CodedLinear
from bagel_compress.codecs.nf4 import Nf4
from bagel_compress.errors import CodecError

CODECS: list[Codec] = [
    Nf4(),
    Nf4(double_quant=True),
    Int8(),
    Fp8(),
    Fp8(granularity="tensor"),
    Int4(),
]
each = pytest.mark.parametrize("codec", CODECS, ids=str)


def linear(codec: Codec, tensor: torch.Tensor, bias: torch.Tensor | None = None) -> CodedLinear:
    module = codec.linear(spec_of(tensor), encoded(codec, tensor), bias)
    assert isinstance(module, CodedLinear)
    return module


@each
@pytest.mark.parametrize("shape", [(64, 128), (7, 33), (96, 64), (32, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_cpu_it_is_decode_and_multiply(codec: Codec, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if codec.format == "int4" and shape[1] % 32:
        shape = (shape[0], 32)
    tensor, bias = weight(*shape), weight(1, shape[0], seed=1)[0]
    for x in (weight(1, shape[1], seed=2, scale=1.0), weight(2, 3, shape[1], seed=3, scale=1.0)):
        x = x.to(dtype)
        expected = functional.linear(x, decoded(codec, tensor).to(dtype), bias.to(dtype))
        assert torch.equal(linear(codec, tensor, bias)(x), expected)
        assert torch.equal(linear(codec, tensor)(x), functional.linear(x, decoded(codec, tensor).to(dtype)))


@each
def test_without_bitsandbytes_the_result_is_the_same(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, x = weight(96, 128), weight(5, 128, seed=2, scale=1.0)
    expected = linear(codec, tensor)(x)
    monkeypatch.setattr(nf4_linear, "bitsandbytes_ops", lambda: None)
    monkeypatch.setattr(int8_linear, "bitsandbytes_ops", lambda: None)
    assert torch.equal(linear(codec, tensor)(x), expected)


@pytest.mark.parametrize(("shape", "used"), [((64, 128), True), ((96, 64), True), ((7, 33), False), ((5, 10), False)])
def test_bitsandbytes_decodes_what_it_decodes_rightly(
    shape: tuple[int, int], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor, calls = weight(*shape), list[tuple[object, ...]]()

    class Library:
        class dequantize_4bit:  # noqa: N801 - as bitsandbytes calls it
            @staticmethod
            def default(*given: object) -> torch.Tensor:
                calls.append(given)
                return decoded(Nf4(), tensor)

    monkeypatch.setattr(nf4_linear, "bitsandbytes_ops", lambda: Library)
    assert torch.equal(linear(Nf4(), tensor)(torch.eye(shape[1])), decoded(Nf4(), tensor).float().T)
    assert bool(calls) == used


@each
def test_a_cast_leaves_codes_and_scales_alone(codec: Codec) -> None:
    tensor, x = weight(64, 64), weight(5, 64, seed=2, scale=1.0)
    module = linear(codec, tensor, weight(1, 64, seed=1)[0])
    before, dtypes = module(x), [b.dtype for b in module.buffers()]
    for cast in (module.float, module.half, module.bfloat16):
        cast()
        assert [b.dtype for b in module.buffers()] == dtypes
        assert torch.equal(module(x), before)
    assert all(b.is_meta for b in module.to("meta").buffers())


@each
def test_the_census_says_what_is_held(codec: Codec) -> None:
    tensor = weight(64, 128)
    parts = encoded(codec, tensor)
    module = codec.linear(spec_of(tensor), parts, None)
    about = module.describe()
    assert about["codec"] == codec.format
    codes = parts[f"{NAME}_packed" if codec.format == "int4" else NAME]
    assert about["stored"] == str(codes.dtype).removeprefix("torch.")
    assert about["compute"] == "decoded to bfloat16"
    stored = sum(part.nbytes for part in parts.values())
    assert stored - 400 <= module.stored_bytes <= stored + 4  # without the text, the code book and the format byte


@each
def test_fake_tensors_stand_for_the_codes(codec: Codec) -> None:
    tensor = weight(96, 128)
    parts, spec = encoded(codec, tensor), spec_of(tensor)
    real = codec.linear(spec, parts, None)
    with FakeTensorMode() as mode:
        module = codec.linear(spec, {name: mode.from_tensor(part) for name, part in parts.items()}, None)
        y = module(torch.empty(3, 128, dtype=torch.bfloat16))
        assert y.shape == (3, 96)
        assert y.dtype == torch.bfloat16
        assert module.stored_bytes == real.stored_bytes


@each
def test_wrong_parts_are_refused(codec: Codec) -> None:
    with pytest.raises(CodecError, match="damaged"):
        codec.linear(spec_of(weight(64, 128)), encoded(codec, weight(64, 64)), None)


@pytest.mark.parametrize(
    ("codec", "limit"), [(Int8(), 0.02), (Fp8(), 0.045), (Fp8(granularity="tensor"), 0.045)], ids=str
)
@pytest.mark.parametrize("shape", [(6, 256), (2, 3, 256)], ids=str)
def test_kernels_of_other_devices_compute_the_same_product(codec: Codec, limit: float, shape: tuple[int, ...]) -> None:
    """The CUDA paths are made of operators that CPUs have too: same code, run here."""
    tensor, bias, x = weight(128, 256), weight(1, 128, seed=1)[0], weight(*shape, seed=2, scale=1.0)
    x[..., 17] *= 20  # an outlier column, which LLM.int8 keeps in fp16
    module = linear(codec, tensor, bias)
    expected = functional.linear(x.float(), tensor.float(), bias.float())
    y = module.multiply(x)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    assert _relative(y, expected) < limit


@pytest.mark.parametrize("double_quant", [False, True])
def test_gemm_4bit_computes_the_same_product(double_quant: bool) -> None:
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        pytest.skip("bitsandbytes before 0.50")
    tensor, bias, x = weight(128, 256), weight(1, 128, seed=1)[0], weight(2, 3, 256, seed=2, scale=1.0)
    module = linear(Nf4(double_quant=double_quant), tensor, bias)
    assert _relative(module.multiply(x), module(x).float()) < 1e-3


def _relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(y.float() - expected) / torch.linalg.vector_norm(expected))


@pytest.mark.gpu
@each
def test_on_cuda_it_is_near_decode_and_multiply(codec: Codec) -> None:
    tensor, bias = weight(256, 512), weight(1, 256, seed=1)[0]
    module = linear(codec, tensor, bias).cuda()
    decoding = module.describe()["compute"] == "decoded to bfloat16"
    assert not decoding or codec.format == "int4" or torch.cuda.get_device_capability() < (8, 9)
    for rows in (1, 7, 64):
        x = weight(rows, 512, seed=2, scale=1.0)
        expected = functional.linear(x.float(), decoded(codec, tensor).float(), bias.float())
        assert _relative(module(x.cuda()).cpu(), expected) < 0.045


def test_readers_configs_parse() -> None:
    transformers = pytest.importorskip("transformers")
    compressed = pytest.importorskip("compressed_tensors.quantization")
    for codec in (Nf4(double_quant=True), Int8()):
        entry = _entry(codec)
        config = transformers.BitsAndBytesConfig.from_dict(dict(entry))
        again = config.to_dict()
        assert {key: again[key] for key in entry} == entry
    for granularity in ("channel", "tensor"):
        config = compressed.QuantizationConfig.model_validate(_entry(Fp8(granularity=granularity)))
        assert config.format == "float-quantized"
        assert config.ignore == ["a.b"]
        assert config.config_groups["group_0"].weights.strategy == granularity


def _entry(codec: Codec) -> dict[str, object]:
    entry: Callable[..., dict[str, dict[str, object]]] = codec.config
    return entry([], ["a.b"])["quantization_config"]
