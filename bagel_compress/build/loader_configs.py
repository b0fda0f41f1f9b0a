"""The config files that other loaders need: `config.json`, `model.safetensors.index.json`, and for a server
`preprocessor_config.json`.

With one format, `config.json` has that format's own entry (bitsandbytes, compressed-tensors or dfloat11). No other
loader reads several formats in one artifact; `quantization_config` then names a method that no library knows, so that
other loaders stop with an error instead of reading, for example, FP8 codes as uncompressed weights.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from bagel.layout import official_role
from bagel_compress.codecs.base import Codec, Unit

MIXED_METHOD = "bagel-compress-mixed"
READER_KEYS = ("quantization_config", "dfloat11_config")


def config_json(configs: Mapping[str, Mapping[str, Any]], stored: Sequence[tuple[Unit, Codec]]) -> bytes:
    """The artifact's config.json: the source's (or a minimal one), with the entries of the formats that are used."""
    base: dict[str, Any] = {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel"}
    base |= configs.get("config.json", {})
    for key in READER_KEYS:
        base.pop(key, None)
    for key, file in (("llm_config", "llm_config.json"), ("vit_config", "vit_config.json")):
        base.setdefault(key, configs[file])
    return _json(base | _reader_entries(stored))


def index_json(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """`model.safetensors.index.json`: stored tensor -> shard; `total_size` counts tensor bytes without headers."""
    return _json({"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))})


def preprocessor_json(vit_config: Mapping[str, Any]) -> bytes:
    """`preprocessor_config.json` of transformers' SigLIP image processor: the square that the ViT was made for."""
    side = vit_config["image_size"]
    half = [0.5, 0.5, 0.5]
    return _json({
        "image_processor_type": "SiglipImageProcessor", "do_resize": True, "size": {"height": side, "width": side},
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": half, "image_std": half,
    })  # fmt: skip


def _reader_entries(stored: Sequence[tuple[Unit, Codec]]) -> dict[str, Any]:
    linears = [s.name for unit, _ in stored for s in unit.specs if official_role(s.name).kind in ("linear", "head")]
    units: dict[str, list[Unit]] = defaultdict(list)
    codecs: dict[str, Codec] = {}
    for unit, codec in stored:
        units[codec.format].append(unit)
        codecs.setdefault(codec.format, codec)
    entries: dict[str, dict[str, Any]] = {}
    for name, codec in codecs.items():
        own = {s.name for unit in units[name] for s in unit.specs}
        others = sorted(linear.removesuffix(".weight") for linear in linears if linear not in own)
        if entry := codec.config(units[name], others):
            entries[name] = entry
    if len(entries) <= 1:
        return next(iter(entries.values()), {})
    return {"quantization_config": {"quant_method": MIXED_METHOD, "reader": "bagel-compress", "formats": entries}}


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
