"""`quantization_config` as the `compressed-tensors` package and vLLM parse it (package version 0.20)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DYNAMIC_TOKENS = {"strategy": "token", "dynamic": True}  # activations are coded as they come, one scale per token


def quantization_config(
    format: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None, others: Sequence[str]
) -> dict[str, Any]:
    """The entry of config.json for linear modules of one format, but for the modules named in `others`."""
    group = {
        "targets": ["Linear"],
        "weights": dict(weights),
        "output_activations": None,
        "input_activations": None if activations is None else dict(activations),
    }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(others),
            "kv_cache_scheme": None,
        }
    }
