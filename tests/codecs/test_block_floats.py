"""nvfp4, mxfp4 and mxfp8 by their definitions, and decoded by the packages that other people load them with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codec_weights import NAME, decoded, encoded, quality_of, same_bytes, snr_db, unit_of, weight, written
from other_packages import comfy_kitchen_weight, compressed_tensors_weight

from bagel_compress.codecs.base import Codec
from bagel_compress.codecs.block_floats import BlockFloat, decode_blocks, unpack_fp4
from bagel_compress.codecs.matrix import as_floats
from bagel_compress.codecs.mxfp import Mxfp4, Mxfp8
from bagel_compress.codecs.nvfp4 import Nvfp4, e4m3_bytes, e4m3_values, global_exponent
from bagel_compress.errors import PlanError

ALL: list[BlockFloat] = [Mxfp8(), *(codec(scale=s) for codec in (Nvfp4, Mxfp4) for s in ("absmax", "mse"))]
every = pytest.mark.parametrize("codec", ALL, ids=str)
WEIGHTS = {
    "normal": lambda: weight(160, 320),
    "heavy tails": lambda: (weight(160, 320).float() ** 3 * 1e4).bfloat16(),
    "zero blocks": lambda: weight(160, 320) * (torch.arange(320) // 16 % 3 > 0),
    "wide range": lambda: (weight(160, 320).float() * torch.logspace(-20, 3, 160)[:, None]).bfloat16(),
    "huge": lambda: weight(160, 320, scale=3e37),
    "largest": lambda: torch.full((160, 320), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16),
    "tiny": lambda: weight(160, 320, scale=1e-38),
}
weights = pytest.mark.parametrize("name", WEIGHTS)


@every
@weights
def test_compressed_tensors_decodes_the_same_weights(codec: BlockFloat, name: str) -> None:
    tensor = WEIGHTS[name]()
    parts = encoded(codec, tensor)
    assert same_bytes(compressed_tensors_weight(codec, unit_of(tensor), parts), decoded(codec, tensor))


def test_fp4_codes_are_the_nearest_levels() -> None:
    """By trying all sixteen, ties to the code that ends in 0."""
    levels = unpack_fp4(torch.arange(16, dtype=torch.uint8)[None])[0, ::2]
    tensor = weight(32, 64)
    codec = Nvfp4()
    parts = encoded(codec, tensor)
    scale = parts[f"{NAME}_scale"].float() / parts[f"{NAME}_global_scale"]
    relative = tensor.float().unflatten(1, (-1, 16)) / scale[..., None]
    distance = (relative[..., None] - levels).abs()
    even = distance + torch.tensor([0.0, 1e-7] * 8)
    nearest = levels[even.argmin(-1)]
    found = unpack_fp4(parts[f"{NAME}_packed"]).unflatten(1, (-1, 16))
    assert torch.equal(found, nearest)


def test_every_e4m3_number_is_written_and_read() -> None:
    codes = np.arange(127, dtype=np.uint8)
    assert np.array_equal(e4m3_values(codes), torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy())
    assert np.array_equal(e4m3_bytes(e4m3_values(codes)), codes.clip(1))


@pytest.mark.parametrize("value", [2688.0, 2704.0, 1.0, 1.3125 * 2**-40, 1.328125 * 2**-40, 3.3895e38])
def test_the_global_scale_is_the_least_power_of_two_that_fits(value: float) -> None:
    word = int(torch.tensor(value).bfloat16().view(torch.int16))
    exponent = global_exponent(word)
    assert value / 6 <= 448 * 2.0**exponent
    assert value / 6 > 448 * 2.0 ** (exponent - 1)


@pytest.mark.parametrize("codec", [Mxfp4(), Mxfp8()], ids=str)
def test_microscales_are_the_least_that_clip_nothing(codec: Mxfp4 | Mxfp8) -> None:
    tensor, largest = weight(160, 320), codec.levels.high
    tensor[0, :32] = 0
    tensor[0, 0] = largest  # needs scale 1 exactly
    absmax = tensor.float().unflatten(1, (-1, 32)).abs().amax(2)
    scale = torch.exp2(encoded(codec, tensor)[f"{NAME}_scale"].double() - 127)
    assert bool((absmax <= largest * scale).all())
    assert bool((absmax > largest * scale / 2).all())
    assert float(scale[0, 0]) == 1.0


@pytest.mark.parametrize("codec", [Nvfp4, Mxfp4])
def test_searched_scales_are_never_worse_in_any_block(codec: type[BlockFloat]) -> None:
    tensor = weight(64, 256, seed=3)
    errors = []
    for scale in ("absmax", "mse"):
        error = (decoded(codec(scale=scale), tensor).double() - tensor.double()).square()
        errors.append(error.unflatten(1, (-1, codec.block)).sum(2))
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())  # the search adds in fp32
    assert float(errors[1].sum()) < float(errors[0].sum())


def test_searched_scales_hold_four_over_six() -> None:
    """Per block, the better of mapping the largest weight to 6 and to 4 is among what is tried."""
    tensor = weight(64, 256, seed=4)
    codec, blocks = Nvfp4(), tensor.float().unflatten(1, (-1, 16))
    scale = 2.0 ** global_exponent(int(tensor.abs().amax().view(torch.int16)))
    best = torch.full(blocks.shape[:2], torch.inf)
    levels = unpack_fp4(torch.arange(16, dtype=torch.uint8)[None])[0, ::2]
    for largest in (6.0, 4.0):
        s = (blocks.abs().amax(2) / largest / scale).clamp(2**-9, 448).to(torch.float8_e4m3fn).float() * scale
        nearest = levels[(blocks[..., None] / s[..., None, None] - levels).abs().argmin(-1)]
        best = torch.minimum(best, (blocks - nearest * s[..., None]).square().sum(2))
    found = (decoded(codec.model_copy(update={"scale": "mse"}), tensor).float() - tensor.float()).square()
    assert bool((found.unflatten(1, (-1, 16)).sum(2) <= best * (1 + 1e-5)).all())


def test_blocks_under_the_range_of_scales_get_the_smallest_one() -> None:
    tensor = weight(4, 64)
    tensor[1] *= 1e-8  # 2^-9 * 2^-17 of the largest is the smallest scale
    parts = encoded(Nvfp4(), tensor)
    assert parts[f"{NAME}_scale"][1].view(torch.uint8).eq(1).all()
    assert not decoded(Nvfp4(), tensor)[1].any()
    assert "4 of 16 blocks are under the range" in written(Nvfp4(), tensor).reason
    assert written(Nvfp4(), weight(4, 64)).reason == ""


def test_a_block_is_under_the_range_where_its_scale_is_more_than_twice_what_it_needs() -> None:
    tensor = weight(4, 64)
    scaling = Nvfp4().scaling(unit_of(tensor), int(tensor.abs().max().view(torch.int16)))
    words = np.arange(1, int(tensor.abs().max().view(torch.int16)) + 1, dtype=np.uint16)
    told = np.array([bool(scaling.note(words[i : i + 1])) for i in range(words.size)])
    wanted = as_floats(words).astype(np.float64) / 6
    assert np.array_equal(told, scaling.table[scaling.plain[words]] > 2 * wanted)
    assert 0 < told.sum() < words.size


@every
def test_what_the_encoder_says_of_its_error_is_true(codec: BlockFloat) -> None:
    tensor = WEIGHTS["heavy tails"]()
    assert quality_of(codec, tensor).snr_db == pytest.approx(snr_db(tensor, decoded(codec, tensor)), abs=1e-3)


@every
@weights
def test_the_grid_decodes_to_what_its_packed_parts_do(codec: BlockFloat, name: str) -> None:
    from bagel_compress.codecs.grid import Curvature

    tensor = WEIGHTS[name]()
    unit, ones = unit_of(tensor), torch.ones(tensor.shape[1])
    grid = codec.grid(unit.specs[0])
    scales = grid.scales(tensor.float(), Curvature(ones, ones))
    levels = grid.levels.nearest(tensor.float() / scales.values.repeat_interleave(codec.block, 1))
    parts = grid.pack(levels, scales)
    assert {n: (p.shape, p.dtype) for n, p in parts.items()} == {
        n: (p.shape, p.dtype) for n, p in encoded(codec, tensor).items()
    }
    assert torch.equal(codec.decode(unit, parts)[NAME], grid.decode(levels, scales.values))
    if codec.scale == "absmax":
        nearest = encoded(codec, tensor)
        assert all(torch.equal(parts[n].view(torch.uint8), nearest[n].view(torch.uint8)) for n in (f"{NAME}_scale",))


@pytest.mark.parametrize("codec", [Nvfp4(), Mxfp4(), Mxfp8()], ids=str)
def test_rows_that_are_no_whole_blocks_are_a_plan_error(codec: BlockFloat) -> None:
    with pytest.raises(PlanError, match=rf"w.weight: codec {codec.format} needs rows of a multiple of {codec.block}"):
        codec.check(unit_of(weight(8, 72)))


def test_decoding_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    codec: Codec = Nvfp4()
    tensor = weight(48, 64)
    whole = decoded(codec, tensor)
    monkeypatch.setattr("bagel_compress.codecs.block_floats.DECODE_ELEMENTS", 200)
    assert torch.equal(decoded(codec, tensor), whole)
    assert decode_blocks(torch.zeros(3, 8, dtype=torch.uint8), torch.ones(3, 1), 16).shape == (3, 16)


@pytest.mark.parametrize("codec", [Nvfp4(), Mxfp8()], ids=str)
@weights
def test_comfy_kitchen_decodes_the_same_weights(codec: BlockFloat, name: str) -> None:
    tensor = WEIGHTS[name]()
    parts = encoded(codec, tensor)
    assert same_bytes(comfy_kitchen_weight(codec, unit_of(tensor), parts), decoded(codec, tensor))
