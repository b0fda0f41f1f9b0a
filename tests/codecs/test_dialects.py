"""Every dialect of the older formats, decoded by the package it is written for."""

from __future__ import annotations

import re

import pytest
import torch
from codec_weights import NAME, decoded, encoded, same_bytes, unit_of, weight
from other_packages import comfy_kitchen_weight, compressed_tensors_weight

from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs.base import Codec, Unit
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.codecs.int4 import Int4, packed_zeros, unpack
from bagel_compress.codecs.int8 import Int8
from bagel_compress.errors import ExportError, PlanError, RecipeError
from bagel_compress.io.tensor_spec import TensorSpec

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
        ("{format: nvfp4, dialect: comfyui}", "dialect"),
        ("{format: mxfp8, scale: mse}", "scale"),
        ("{format: int4, dialect: auto-round, symmetric: false}", "auto-round has no zero points"),
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
    with pytest.raises(PlanError, match="auto-round needs a multiple of 8 rows, found 12"):
        Int4(dialect="auto-round").check(unit_of(weight(12, 64)))
    with pytest.raises(ExportError, match="compressed-tensors' dialect"):
        Int4(dialect="auto-round").onnx_form("x.weight", "onnxruntime-cpu", "none")
    with pytest.raises(ExportError, match="group 32"):
        Int4(group=64).onnx_form("x.weight", "onnxruntime-cpu", "none")


@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_auto_round_holds_the_same_codes_by_columns(scale: str) -> None:
    values = weight(72, 128)
    one, other = Int4(scale=scale), Int4(scale=scale, dialect="auto-round")
    a, b = encoded(one, values), encoded(other, values)
    words = b["w.qweight"]  # (K/8, N): code k of a word is that of column 8 * row + k
    codes = torch.stack([(words >> 4 * k & 15) - 8 for k in range(8)], 1).flatten(0, 1).t()
    assert torch.equal(codes.to(torch.int8), unpack(a[f"{NAME}_packed"]))
    assert torch.equal(b["w.scales"].t(), a[f"{NAME}_scale"])
    assert bool((b["w.qzeros"] == 0x77777777).all())
    assert torch.equal(decoded(one, values), decoded(other, values))


def test_auto_rounds_patterns_name_what_is_not_coded() -> None:
    mlp = [unit_of_name(f"language_model.model.layers.{i}.mlp.up_proj.weight") for i in range(2)]
    others = ["language_model.model.layers.1.self_attn.q_proj", "lm_head", "vit.layers.1.mlp.fc1"]
    entry = Int4(dialect="auto-round").config(mlp, others)["quantization_config"]["extra_config"]

    def bits(name: str) -> set[int]:
        return {value["bits"] for pattern, value in entry.items() if re.search(pattern, name)}

    assert bits("bagel.language_model.model.layers.27.self_attn.qkv_proj") == {16}
    assert bits("bagel.language_model.lm_head") == {16}
    assert bits("bagel.vit.layers.20.mlp.fc2") == {16}
    assert not bits("bagel.language_model.model.layers.1.mlp.gate_up_proj")
    whole = "language_model.model.layers.1.mlp"
    with pytest.raises(PlanError, match=rf"{whole}: .*codes some of its weights"):
        Int4(dialect="auto-round").config(mlp, [f"{whole}.down_proj"])
    first = Int4(dialect="auto-round").config(mlp[1:], ["language_model.model.layers.0.mlp.up_proj"])
    (pattern,) = first["quantization_config"]["extra_config"]
    assert re.search(pattern, "bagel.language_model.model.layers.0.mlp.gate_up_proj")
    assert not re.search(pattern, "bagel.language_model.model.layers.1.mlp.gate_up_proj")


def unit_of_name(name: str) -> Unit:
    return Unit(name, (TensorSpec("BF16", (8, 64), name),))
