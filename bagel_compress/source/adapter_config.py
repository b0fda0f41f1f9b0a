"""adapter_config.json of a peft LoRA. A key is used, ignored because it cannot change a merge, or refused by its name.

Which modules are adapted and by what scale follows peft's own rules (0.21: `check_target_module_exists`,
`get_pattern_key`, `LoraLayer.update_layer`), so that a merge here gives the weights that peft's merge gives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel.json_file import small_bytes
from bagel_compress.errors import CheckpointError
from bagel_compress.source.patterns import PatternError, first_match, fullmatch

CONFIG = "adapter_config.json"
DEFAULT_ALPHA = 8  # peft's LoraConfig.lora_alpha
MAX_BYTES = 10_000_000  # a larger file is refused; peft writes a few thousand bytes
# Keys that only describe the adapter, or that only training reads.
NEUTRAL = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
})  # fmt: skip
USED = frozenset({
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
})  # fmt: skip
# Initialisations that leave the base's weights unchanged. The others (pissa, olora, corda, loftq, lora_ga) subtract a
# part of each base weight before training; the adapter does not store that part.
INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings that a merge needs. Module names are those of the trained model, which may be a part of BAGEL."""

    path: Path
    rank: int
    alpha: float
    stabilised: bool  # scale is alpha / sqrt(rank) instead of alpha / rank
    ranks: Mapping[str, int]  # by pattern
    alphas: Mapping[str, float]  # by pattern
    target: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...]  # empty: all
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]  # modules that were trained and saved in full (modules_to_save)

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Reads the config. Raises CheckpointError naming the first key that is unsupported or has a wrong type."""
        path = folder / CONFIG
        raw = _read(path)
        if str(raw.get("peft_type", "LORA")).upper() != "LORA" or "r" not in raw:
            raise CheckpointError(f"{path} does not describe a LoRA adapter (peft_type LORA with r and lora_alpha).")
        _refuse(raw, path)
        return cls(
            path,
            rank=_rank(raw["r"], "r", path),
            alpha=_number(raw.get("lora_alpha", DEFAULT_ALPHA), "lora_alpha", path),
            stabilised=_flag(raw, "use_rslora", path),
            ranks={k: _rank(v, f"rank_pattern {k!r}", path) for k, v in _table(raw, "rank_pattern", path).items()},
            alphas={k: _number(v, f"alpha_pattern {k!r}", path) for k, v in _table(raw, "alpha_pattern", path).items()},
            target=_names(raw, "target_modules", path, pattern=True),
            exclude=_names(raw, "exclude_modules", path, pattern=True) or (),
            layers=_layers(raw.get("layers_to_transform"), path),
            layers_pattern=_list(raw, "layers_pattern", path),
            saved=_list(raw, "modules_to_save", path),
        )

    def targets(self, module: str) -> bool:
        """Whether peft puts a LoRA on this module. Raises CheckpointError on a pattern that cannot be matched."""
        if self.target is None:
            return True  # peft chose the modules by the model's type; whatever the file holds was chosen
        try:
            if self._excluded(module):
                return False
            if isinstance(self.target, str):
                return self.target.lower() == "all-linear" or fullmatch(self.target, module)
            if module in self.target:
                return True
            named = any(module.endswith(f".{name}") for name in self.target)
            return named and (not self.layers or self._layer(module) in self.layers)
        except PatternError as error:
            raise self._bad_pattern(
                "target_modules, exclude_modules, layers_pattern or modules_to_save", error
            ) from None

    def scale(self, module: str, rank: int | None) -> float:
        """The factor of B @ A. Raises CheckpointError if `rank`, read from the tensors, is not the config's.

        `rank` is None where the tensors do not show it (a bias); the config's rank is used then.
        """
        try:
            rank_key, alpha_key = first_match(tuple(self.ranks), module), first_match(tuple(self.alphas), module)
        except PatternError as error:
            raise self._bad_pattern("rank_pattern or alpha_pattern", error) from None
        expected = self.rank if rank_key is None else self.ranks[rank_key]
        if rank not in (None, expected):
            raise CheckpointError(
                f"{self.path.parent}: the LoRA of {module} has rank {rank}, {CONFIG} says {expected}."
            )
        alpha = self.alpha if alpha_key is None else self.alphas[alpha_key]
        return alpha / (math.sqrt(expected) if self.stabilised else expected)

    def _excluded(self, module: str) -> bool:
        if isinstance(self.exclude, str):
            if fullmatch(self.exclude, module):
                return True
        elif any(module == name or module.endswith(f".{name}") for name in self.exclude):
            return True
        return any(fullmatch(rf"(|.*\.)({name})(|\..*)", module) for name in self.saved)

    def _layer(self, module: str) -> int | None:
        """The layer number in a module's name: the first number between dots that follows a name.

        With `layers_pattern`, that name has to match one of its patterns. None if there is no such number.
        """
        parts = module.split(".")
        for pattern in self.layers_pattern or (r"[^.]*\.[^.]*",):
            for i in range(1, len(parts) - 1):
                if parts[i].isdecimal() and fullmatch(rf"(|.*\.)({pattern})", ".".join(parts[:i])):
                    return int(parts[i])
        return None

    def _bad_pattern(self, keys: str, error: PatternError) -> CheckpointError:
        return CheckpointError(f"{self.path}: a pattern of {keys} {error}; write plain module names into it.")


def _refuse(raw: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError on a setting with which peft's merge is not W + scale * B @ A."""
    for key in sorted(raw.keys() - USED - NEUTRAL):
        if raw[key]:
            raise CheckpointError(
                f"{path} sets {key}, which cannot be merged here; merge it with peft and give the result."
            )
    init = str(raw.get("init_lora_weights", True)).lower()
    if init not in (*INITS, "none"):
        raise CheckpointError(
            f"{path} sets init_lora_weights to {init[:40]!r}, which changes the base's weights too and cannot be merged"
            " here; let peft save it as a plain LoRA (path_initial_model_for_weight_conversion), or merge it."
        )
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{path}: bias is {str(raw['bias'])[:40]!r}, expected none, all or lora_only.")
    _flag(raw, "lora_bias", path)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(small_bytes(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or integers of 5,000 digits
        raise CheckpointError(f"{path} is not readable JSON ({error}); give the folder that peft saved.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, expected a JSON object.")
    return raw


def _rank(value: Any, key: str, path: Path) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise CheckpointError(f"{path}: {key} is {str(value)[:40]}, expected a positive integer.")
    return value


def _number(value: Any, key: str, path: Path) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:  # NaN compares as false
        raise CheckpointError(f"{path}: {key} is {str(value)[:40]}, expected a number that a weight can be scaled by.")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, path: Path) -> bool:
    value = raw.get(key)
    if value is not None and type(value) is not bool:
        raise CheckpointError(f"{path}: {key} is {str(value)[:40]!r}, expected true or false.")
    return bool(value)


def _table(raw: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key} is a {type(value).__name__}, expected a table of patterns.")
    return value


def _list(raw: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    found = _names(raw, key, path, pattern=False)
    return (found,) if isinstance(found, str) else found or ()


def _names(raw: Mapping[str, Any], key: str, path: Path, pattern: bool) -> str | tuple[str, ...] | None:
    """The value of a key that holds a pattern (str) or a list of names (tuple); None if it is absent or empty."""
    value = raw.get(key)
    if value is None or isinstance(value, str):
        return value or None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        expected = "a pattern or a list of names" if pattern else "a list of names"
        raise CheckpointError(f"{path}: {key} is {str(value)[:40]}, expected {expected}.")
    return tuple(value)


def _layers(value: Any, path: Path) -> tuple[int, ...]:
    layers = [value] if type(value) is int else value or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise CheckpointError(f"{path}: layers_to_transform is {str(value)[:40]}, expected a list of layer numbers.")
    return tuple(layers)
