"""Stored parts decoded by the packages that other loaders use; the test is skipped where one is not installed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from bagel_compress.codecs.base import Codec, Unit


def compressed_tensors_weight(codec: Codec, unit: Unit, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What `compressed-tensors` makes of the parts, told the format by the codec's own entry of config.json."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    entry = codec.config([unit], [])["quantization_config"]
    config = QuantizationConfig.model_validate(entry)
    compressor = BaseCompressor.get_value_from_registry(config.format)
    (spec,) = unit.specs
    module = spec.name.removesuffix("weight")
    state = {name.removeprefix(module): tensor for name, tensor in parts.items()}
    return compressor.decompress(state, config.config_groups["group_0"])["weight"].data


def comfy_kitchen_weight(codec: Codec, unit: Unit, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What ComfyUI's kernels package makes of the tensors of a ComfyUI file."""
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.backends import eager

    (spec,) = unit.specs
    module = spec.name.removesuffix("weight")
    values = {name.removeprefix(module): tensor for name, tensor in codec.comfyui_values(unit, parts).items()}
    weight, scale = values["weight"], values["weight_scale"]
    match codec.comfyui_format:
        case "nvfp4":
            return eager.dequantize_nvfp4(weight, values["weight_scale_2"], scale)
        case "mxfp8":
            return eager.dequantize_mxfp8(weight, scale.view(torch.float8_e8m0fnu))
        case "int8_tensorwise":
            return eager.dequantize_int8_simple(weight, scale).bfloat16()
        case _:
            return eager.dequantize_per_tensor_fp8(weight, scale)
