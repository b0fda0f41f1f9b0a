"""Every dialect of the older formats, decoded by the package it is written for."""

from __future__ import annotations

import pytest
import torch
from codec_weights import NAME, decoded, encoded, same_bytes, unit_of, weight
from other_packages import comfy_kitchen_weight, compressed_tensors_weight

from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs.base import Codec
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.codecs.int4 import Int4, packed_zeros, unpack
from bagel_compress.codecs.int8 import Int8
from bagel_compress.errors import ExportError, PlanError, RecipeError

COMPRESSED_TENSORS = [
    *(Int4(group=g, symmetric=s) for g in (32, 64, 128) for s in (True, False)),
    Int4(group=64, scale="mse"),
    Int8(dialect="compressed-tensors"),
    Int8(dialect="compressed-tensors", scale="mse"),
    Fp8(),
    Fp8(granularity="tensor"),
]
SKEWED = {
    "normal": lambda: weight(75, 256),
    "positive": lambda: weight(75, 256).abs(),
    "shifted": lambda: weight(75, 256) - 0.03,
    "zeros": lambda: weight(16, 128) * 0,
}


@pytest.mark.parametrize("codec", COMPRESSED_TENSORS, ids=str)
@pytest.mark.parametrize("name", SKEWED)
def test_compressed_tensors_decodes_the_same_weights(codec: Codec, name: str) -> None:
    values = SKEWED[name]()
    theirs = compressed_tensors_weight(codec, unit_of(values), encoded(codec, values)).bfloat16()
    assert torch.equal(theirs, decoded(codec, values))


@pytest.mark.parametrize(
    "codec", [Int8(dialect="compressed-tensors"), Fp8(granularity="tensor", dialect="vllm")], ids=str
)
def test_comfy_kitchen_decodes_the_same_weights(codec: Codec) -> None:
    values = weight(75, 256)
    assert same_bytes(comfy_kitchen_weight(codec, unit_of(values), encoded(codec, values)), decoded(codec, values))


def test_dialects_hold_the_same_codes() -> None:
    values = weight(75, 256)
    for one, other in (
        (Int8(), Int8(dialect="compressed-tensors")),
        (Fp8(granularity="tensor"), Fp8(granularity="tensor", dialect="vllm")),
    ):
        a, b = encoded(one, values), encoded(other, values)
        assert same_bytes(a[NAME], b[NAME])
    assert torch.equal(decoded(one, values), decoded(other, values))  # fp8: the scale is the same number
    assert b[f"{NAME}_scale"].shape == ()


def test_zero_points_are_packed_as_the_package_does_it() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    zeros = torch.randint(-8, 8, (75, 3), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = torch.from_numpy(packed_zeros(zeros.numpy()))
    assert torch.equal(packed, helpers.pack_to_int32(zeros, 4, packed_dim=0))
    assert torch.equal(unpack(packed.t()).t()[:75], zeros)


def test_a_zero_point_helps_where_weights_lean_to_one_side() -> None:
    values = weight(64, 256) - 0.03
    codecs = [Int4(symmetric=symmetric) for symmetric in (True, False)]
    errors = [float((decoded(codec, values).float() - values.float()).norm()) for codec in codecs]
    assert errors[1] < 0.8 * errors[0]


def test_asymmetric_codes_are_the_nearest() -> None:
    values = weight(64, 256) - 0.01
    codec = Int4(symmetric=False)
    parts = encoded(codec, values)
    scale = parts[f"{NAME}_scale"].float()[..., None]
    zeros = unpack(parts[f"{NAME}_zero_point"].t()).t()[:64, :, None]
    codes = unpack(parts[f"{NAME}_packed"]).unflatten(1, (-1, 32))
    assert torch.equal(codes.float(), (values.float().unflatten(1, (-1, 32)) / scale + zeros).round().clamp(-8, 7))


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        ("{format: int4, symmetric: false, scale: mse}", "symmetric: false has scale absmax"),
        ("{format: int4, symmetric: false, rounding: gptq}", "symmetric: false has scale absmax and rounding nearest"),
        ("{format: fp8, dialect: vllm}", "one scale per weight; add granularity: tensor"),
        ("{format: int8, dialect: comfyui}", "dialect"),
        ("{format: int4, group: 48}", "group"),
    ],
)
def test_what_a_codec_cannot_hold_is_refused_when_the_recipe_is_read(codec: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.parse(f"name: x\nrules:\n  - match: {{}}\n    codec: {codec}\n", "x.yaml")


def test_recipes_that_name_no_dialect_keep_their_digests() -> None:
    for codec in (Int8(), Fp8(), Int4()):
        assert not {"dialect", "group", "symmetric", "rounding"} & codec.model_dump().keys()
    assert Int4(group=64).model_dump()["group"] == 64


def test_refusals() -> None:
    values = weight(64, 256)
    with pytest.raises(ExportError, match="bitsandbytes' scales"):
        Int8().comfyui_values(unit_of(values), encoded(Int8(), values))
    with pytest.raises(PlanError, match="multiple of 128 weights, found 192"):
        Int4(group=128).check(unit_of(weight(8, 192)))
    with pytest.raises(ExportError, match="group 32"):
        Int4(group=64).onnx_form("x.weight", "onnxruntime-cpu", "none")
