"""Builds opened from their files by the packages that others load them with: every weight equal to `decode` to the bit.

All layers of BAGEL-nano, and in slow tests the shapes of one layer of the released model.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.comfyui_file import comfyui_file
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs.base import Codec, Unit
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.codecs.int4 import Int4
from bagel_compress.codecs.int8 import Int8
from bagel_compress.codecs.mxfp import Mxfp4, Mxfp8
from bagel_compress.codecs.nvfp4 import Nvfp4
from bagel_compress.errors import PlanError
from bagel_compress.io.packaged import FULL_CONFIGS
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.source.checkpoint import Checkpoint

NANO_LAYERS = 84  # 7 matrices, 2 experts, 6 layers
COMPRESSED_TENSORS: list[Codec] = [
    Int4(), Int4(scale="mse", group=64), Int4(group=64, symmetric=False), Int8(dialect="compressed-tensors"), Fp8(),
    Fp8(granularity="tensor"), Nvfp4(), Nvfp4(scale="mse"), Mxfp8(), Mxfp4(), Mxfp4(scale="mse"),
]  # fmt: skip
WIDE: list[Codec] = [Int4(group=128), Int4(group=128, symmetric=False)]  # BAGEL-nano's rows of 320 have no such groups
COMFYUI: list[Codec] = [
    Int8(dialect="compressed-tensors"), Fp8(granularity="tensor"), Fp8(granularity="tensor", dialect="vllm"), Nvfp4(),
    Nvfp4(scale="mse"), Mxfp8(),
]  # fmt: skip
RELEASED = [(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)]  # o and q; k and v; gate and up; down


def build(codec: Codec, out: Path) -> Artifact:
    """Both experts of BAGEL-nano in this codec."""
    entry = json.dumps(codec.model_dump(mode="json"))
    rules = f"[{{match: {{component: llm, kind: linear}}, codec: {entry}}}, {{match: {{}}, codec: raw}}]"
    nano = Checkpoint.open(FULL_CONFIGS.parent / "BAGEL-nano")
    return compress(make_plan(nano, Recipe.parse(f"name: x\nrules: {rules}\n", "x.yaml")), nano, out)


@cache
def scheme_of(config: str) -> tuple[Any, Any]:
    """compressed-tensors' compressor and scheme for the text of a config.json."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    parsed = QuantizationConfig.model_validate(json.loads(config)["quantization_config"])
    return BaseCompressor.get_value_from_registry(parsed.format), parsed.config_groups["group_0"]


def compressed_tensors_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every coded weight of a folder, from its shards and its config.json."""
    pytest.importorskip("compressed_tensors")
    compressor, scheme = scheme_of((folder / "config.json").read_text("utf-8"))
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            names = set(shard.keys())
            for layer in {name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")}:
                keys = [name for name in names if name.startswith(f"{layer}.weight")]
                state = {name.removeprefix(f"{layer}."): shard.get_tensor(name) for name in keys}
                found[f"{layer}.weight"] = compressor.decompress(state, scheme)["weight"].data.bfloat16()
    return found


def comfy_kitchen_weight(form: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """One layer by the kernel that its file names."""
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.backends import eager

    weight, scale = tensors["weight"], tensors["weight_scale"]
    match form:
        case "nvfp4":
            return eager.dequantize_nvfp4(weight, tensors["weight_scale_2"], scale)
        case "mxfp8":
            return eager.dequantize_mxfp8(weight, scale.view(torch.float8_e8m0fnu))
        case "int8_tensorwise":
            return eager.dequantize_int8_simple(weight, scale).bfloat16()
        case "float8_e4m3fn":
            return eager.dequantize_per_tensor_fp8(weight, scale)
    raise ValueError(form)


def comfy_kitchen_weights(path: Path) -> dict[str, torch.Tensor]:
    """Every coded weight of a ComfyUI file, from the file alone."""
    found = {}
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        for layer, entry in json.loads(file.metadata()["_quantization_metadata"])["layers"].items():
            keys = [name for name in names if name.startswith(f"{layer}.weight")]
            tensors = {name.removeprefix(f"{layer}."): file.get_tensor(name) for name in keys}
            found[f"{layer}.weight"] = comfy_kitchen_weight(entry["format"], tensors)
    return found


def expect_decoded(found: dict[str, torch.Tensor], artifact: Artifact) -> None:
    assert len(found) == NANO_LAYERS
    for name, theirs in found.items():
        ours = artifact.decode(name)[name]
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs.view(torch.int16), ours.view(torch.int16)), name


@pytest.mark.loader
@pytest.mark.parametrize("codec", COMPRESSED_TENSORS, ids=str)
def test_compressed_tensors_reads_every_layer_of_nano(codec: Codec, tmp_path: Path) -> None:
    artifact = build(codec, tmp_path / "a")
    expect_decoded(compressed_tensors_weights(artifact.path), artifact)


@pytest.mark.loader
@pytest.mark.parametrize("codec", COMFYUI, ids=str)
def test_comfy_kitchen_reads_every_layer_of_nano(codec: Codec, tmp_path: Path) -> None:
    artifact = build(codec, tmp_path / "a")
    comfyui_file(artifact, tmp_path / "m.safetensors")
    expect_decoded(comfy_kitchen_weights(tmp_path / "m.safetensors"), artifact)


@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_nvfp4_is_the_same_weights_in_both_dialects(scale: str, tmp_path: Path) -> None:
    """The folder through compressed-tensors and the file through comfy-kitchen, without a decoder of ours."""
    artifact = build(Nvfp4(scale=scale), tmp_path / "a")
    comfyui_file(artifact, tmp_path / "m.safetensors")
    one, other = compressed_tensors_weights(artifact.path), comfy_kitchen_weights(tmp_path / "m.safetensors")
    assert one.keys() == other.keys()
    assert len(one) == NANO_LAYERS
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("codec", WIDE, ids=str)
def test_rows_that_are_no_whole_groups_are_refused_before_anything_is_written(codec: Codec, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"down_proj.weight: codec int4 needs rows of a multiple of 128 .* 320"):
        build(codec, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shape", RELEASED, ids=str)
@pytest.mark.parametrize("codec", sorted({*COMPRESSED_TENSORS, *WIDE, *COMFYUI}, key=str), ids=str)
def test_a_layer_of_the_released_shape(codec: Codec, shape: tuple[int, int]) -> None:
    spec = TensorSpec("BF16", shape, "x.weight")
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(98021)) * 0.02).bfloat16()
    unit = Unit(spec.name, (spec,))
    parts = codec.encode(unit, {spec.name: values})
    ours, found = codec.decode(unit, parts)[spec.name], []
    if codec in (*COMPRESSED_TENSORS, *WIDE):
        pytest.importorskip("compressed_tensors")
        compressor, scheme = scheme_of(json.dumps(codec.config([unit], [])))
        state = {name.removeprefix("x."): tensor for name, tensor in parts.items()}
        found.append(compressor.decompress(state, scheme)["weight"].data.bfloat16())
    if codec in COMFYUI:
        tensors = {name.removeprefix("x."): tensor for name, tensor in codec.comfyui_values(unit, parts).items()}
        found.append(comfy_kitchen_weight(codec.comfyui_format, tensors))
    assert found
    assert all(torch.equal(theirs.view(torch.int16), ours.view(torch.int16)) for theirs in found)
