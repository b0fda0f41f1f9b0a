"""fp8 against torch's cast and against compressed-tensors, which must read our parts bit for bit."""

import numpy as np
import pytest
import torch
from codec_weights import decoded, encoded, quality_of, same_bytes, snr_db, unit_of, weight

from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.errors import CodecError, ExportError

SHAPES = [(64, 64), (7, 33), (1, 1), (3, 1), (300, 250), (129, 4096)]
CODECS = [Fp8(granularity=g, scale=s) for g in ("channel", "tensor") for s in ("absmax", "mse")]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_torchs_cast(shape: tuple[int, int], codec: Fp8) -> None:
    tensor = weight(*shape)
    parts = encoded(codec, tensor)
    scale = parts["w.weight_scale"].float()
    expected = (tensor.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert same_bytes(parts["w.weight"], expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_absmax_scales_are_absmax_over_448_in_bf16(shape: tuple[int, int]) -> None:
    tensor = weight(*shape)
    per_row = (tensor.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    assert same_bytes(encoded(Fp8(), tensor)["w.weight_scale"], per_row)
    whole = (tensor.float().abs().amax().reshape(1) / 448).bfloat16()
    assert same_bytes(encoded(Fp8(granularity="tensor"), tensor)["w.weight_scale"], whole)


def test_codes_are_torchs_cast_at_every_magnitude() -> None:
    """Every finite bf16 word, and rows of every magnitude."""
    words = torch.arange(0, 0x7F80, dtype=torch.int32)
    every = (torch.cat([words, words + 0x8000]) << 16).view(torch.float32).bfloat16().reshape(-1, 128)
    top = (torch.arange(0, 0x7F80, 11, dtype=torch.int32) << 16).view(torch.float32)
    rows = ((torch.rand(len(top), 64, generator=torch.Generator().manual_seed(1)) * 2 - 1) * top[:, None]).bfloat16()
    for tensor in (every, rows):
        parts = encoded(Fp8(), tensor)
        expected = (tensor.float() / parts["w.weight_scale"].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert same_bytes(parts["w.weight"], expected)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_compressed_tensors_decompresses_to_our_decode(granularity: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    codec, tensor = Fp8(granularity=granularity), weight(129, 320)
    parts = encoded(codec, tensor)
    args = QuantizationArgs(num_bits=8, type="float", strategy=granularity, symmetric=True, dynamic=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": parts["w.weight"], "weight_scale": parts["w.weight_scale"]}
    theirs = FloatQuantizationCompressor.decompress(state, scheme)["weight"]
    assert same_bytes(theirs, decoded(codec, tensor))
    # and what it makes of our scales is our codes, up to its division in bf16
    again = FloatQuantizationCompressor.compress({"weight": tensor, "weight_scale": parts["w.weight_scale"]}, scheme)
    assert (again["weight"].float() - parts["w.weight"].float()).abs().mean() < 0.02 * parts[
        "w.weight"
    ].float().abs().mean()


def test_a_row_of_zeros_has_scale_one() -> None:
    tensor = weight(3, 64)
    tensor[1] = 0
    parts = encoded(Fp8(), tensor)
    assert parts["w.weight_scale"][1] == 1
    assert not parts["w.weight"][1].float().any()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_quality_is_that_of_the_decoded_weights(codec: Fp8) -> None:
    tensor = weight(256, 512)
    assert quality_of(codec, tensor).snr_db == pytest.approx(snr_db(tensor, decoded(codec, tensor)), abs=1e-4)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_searched_scales_lose_less(granularity: str) -> None:
    tensor = weight(256, 512)
    found = quality_of(Fp8(granularity=granularity, scale="mse"), tensor)
    plain = quality_of(Fp8(granularity=granularity), tensor)
    assert found.noise < plain.noise


def test_comfyui_form() -> None:
    tensor = weight(64, 96)
    codec = Fp8(granularity="tensor")
    parts = encoded(codec, tensor)
    values = codec.comfyui_values(unit_of(tensor), parts)
    scale = values["w.weight_scale"]
    assert same_bytes(values["w.weight"], parts["w.weight"])
    assert scale.shape == ()
    assert scale.dtype == torch.float32
    assert same_bytes((parts["w.weight"].float() * scale).bfloat16(), decoded(codec, tensor))
    with pytest.raises(ExportError, match="granularity: tensor"):
        Fp8().comfyui_values(unit_of(tensor), encoded(Fp8(), tensor))


def test_bytes_that_do_not_decode_to_the_weights_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One flipped bit in the codes of a row."""
    from bagel_compress.codecs.kernels import rows_kernels

    whole = rows_kernels.fp8_rows

    def faulty(words, scales, codes, sums):  # type: ignore[no-untyped-def]
        whole(words, scales, codes, sums)
        codes[0, 5] ^= 0x20
        rows_kernels.fp8_measure(words[0], scales[0], codes[0], sums[0])

    monkeypatch.setattr(rows_kernels, "fp8_rows", faulty)
    with pytest.raises(CodecError, match=r"w\.weight.*do not decode"):
        encoded(Fp8(), weight(64, 64))


def test_the_searched_scales_lie_around_absmax() -> None:
    from bagel_compress.codecs.fp8 import SEARCH, _candidates
    from bagel_compress.io import bf16

    start = np.array([1.0, 0.37], np.float32)
    words = bf16.rounded(_candidates(start).reshape(-1)).reshape(2, -1).astype(int)
    assert (words - bf16.rounded(start).astype(int)[:, None] == np.array(SEARCH)).all()
    assert sum(SEARCH) > 0  # saturation costs less than a coarse grid: mirrored offsets would be other ones
