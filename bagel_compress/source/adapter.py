"""A peft LoRA adapter, merged row by row while the checkpoint is read: W + scale * B @ A.

The product is taken in float64 and rounded once with the weight, so that the merged bf16 words do not depend on how a
BLAS orders its sums or on how many rows are asked for. Plain and rank-stabilised LoRA of linear layers, and modules
saved whole beside it, are merged; DoRA, embeddings' LoRA and transposed layers are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.errors import CheckpointError
from bagel_compress.io import bf16
from bagel_compress.io.safetensors_file import StoredTensor, TensorFile

if TYPE_CHECKING:
    import numpy as np

Sources = Mapping[str, tuple[TensorFile, StoredTensor]]
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """`pairs`: weight name -> (A of [rank, columns], scale * B of [rows, rank]), float64; `replaced`: whole tensors."""

    pairs: dict[str, tuple[np.ndarray, np.ndarray]]
    replaced: dict[str, tuple[TensorFile, StoredTensor]]

    @classmethod
    def open(cls, folder: Path, normal_name: Callable[[str], str | None], sources: Sources) -> Adapter:
        """Reads adapter_config.json and adapter_model.safetensors. Raises CheckpointError if they do not fit."""
        config = _config(folder)
        file = TensorFile.open(folder / "adapter_model.safetensors")
        halves: dict[str, dict[str, np.ndarray]] = {}
        replaced: dict[str, tuple[TensorFile, StoredTensor]] = {}
        for stored_name, tensor in file.tensors.items():
            match = _LORA.fullmatch(stored_name)
            module = (match[1] if match else stored_name.removesuffix(".weight")).removeprefix(_PREFIX)
            name = normal_name(f"{module}.weight") or normal_name(stored_name.removeprefix(_PREFIX))
            if name is None or name not in sources:
                raise CheckpointError(f"{file.path} adapts {stored_name}, which this checkpoint does not have.")
            if match is None:
                replaced[name] = (file, tensor)
            else:
                halves.setdefault(name, {})[match[2]] = _values(file, tensor)
        pairs = {name: _pair(name, pair, config, sources[name][1], file.path) for name, pair in halves.items()}
        return cls(pairs, replaced)

    def delta(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of what is added to the weight; float64."""
        a, b = self.pairs[name]
        delta: np.ndarray = b[first:last] @ a
        return delta


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); give the folder that peft saved.") from None
    if not isinstance(config, dict) or str(config.get("peft_type", "LORA")).upper() != "LORA" or "r" not in config:
        raise CheckpointError(f"{path} does not describe a LoRA adapter (peft_type LORA with r and lora_alpha).")
    for key in ("use_dora", "fan_in_fan_out"):
        if config.get(key):
            raise CheckpointError(
                f"{path} sets {key}, which cannot be merged here; merge it with peft and give the result."
            )
    return config


def _pair(
    name: str, halves: Mapping[str, np.ndarray], config: Mapping[str, Any], weight: StoredTensor, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    if halves.keys() != {"A", "B"}:
        raise CheckpointError(f"{path} has only lora_{next(iter(halves))} for {name}; expected lora_A and lora_B.")
    a, b = halves["A"], halves["B"]
    if len(weight.shape) != 2 or (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
        found = f"{list(b.shape)} x {list(a.shape)}"
        raise CheckpointError(f"{path}: the LoRA of {name} is {found}, the weight is {list(weight.shape)}.")
    module = name.removesuffix(".weight")
    rank = int(_by_pattern(config.get("rank_pattern"), module, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", config["r"])))
    if rank != a.shape[0]:
        raise CheckpointError(f"{path}: the LoRA of {name} has rank {a.shape[0]}, adapter_config.json says {rank}.")
    return a, b * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """peft's rank_pattern and alpha_pattern: keys are module names, or their endings, as regular expressions."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _values(file: TensorFile, tensor: StoredTensor) -> np.ndarray:
    import numpy as np

    if tensor.dtype not in bf16.WIDTHS:
        raise CheckpointError(f"{file.path} holds {tensor.dtype} tensors, expected BF16, F16 or F32.")
    values = bf16.floats(bf16.stored(file, tensor, 0, tensor.numel), tensor.dtype)
    return values.astype(np.float64).reshape(tensor.shape)
