"""How tensors are grouped into DF11 units, and the `pattern_dict` by which the `dfloat11` package finds them.

A unit is a module: a linear or embedding module by itself, or a larger one with an ordered list of the linears below it
that share its code book. Order is part of the format. The published BAGEL release (huggingface.co/DFloat11,
BAGEL-7B-MoT-DF11) has 31 units: token embeddings, each decoder layer, head, vision tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from bagel_compress.codecs.base import Unit
from bagel_compress.io.tensor_spec import TensorSpec

Grouping = Literal["published", "expert", "tensor"]

_QKVO = tuple(f"self_attn.{p}_proj" for p in "qkvo")
_MLP = tuple(f"{p}_proj" for p in ("gate", "up", "down"))
_LAYER_ORDER = (
    *_QKVO,
    *(f"{name}_moe_gen" for name in _QKVO),
    *(f"mlp.{name}" for name in _MLP),
    *(f"mlp_moe_gen.{name}" for name in _MLP),
)
_VIT_ORDER = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
_LAYER = re.compile(r"(language_model\.model\.layers\.\d+)\.(.+)")
_VIT = re.compile(r"(vit_model)\.(.+)")
_VIT_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def group(specs: Sequence[TensorSpec], grouping: Grouping) -> list[Unit]:
    """Units in the order of the published release; tensors of other modules become units of their own, after them."""
    members: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        members.setdefault(unit_of(spec.name, grouping), []).append(spec)
    units = [
        Unit(name, tuple(sorted(of, key=lambda spec: _within(attribute(name, spec.name)))))
        for name, of in members.items()
    ]
    return sorted(units, key=lambda unit: _between(unit.name))


def unit_of(tensor: str, grouping: Grouping) -> str:
    """Full name of the module whose unit holds this tensor."""
    module = tensor.removesuffix(".weight")
    if grouping == "tensor":
        return module
    if match := _LAYER.fullmatch(module):
        return match[1] if grouping == "published" else f"{match[1]}.{match[2].split('.')[0]}"
    if match := _VIT.fullmatch(module):
        return match[1]
    return module


def attribute(unit: str, tensor: str) -> str:
    """Path of a tensor's module below its unit's module; empty if it is that module."""
    return tensor.removesuffix(".weight")[len(unit) + 1 :]


def pattern_dict(units: Iterable[Unit]) -> dict[str, list[str]]:
    """Ordered {pattern: attribute paths}. Units that differ only in one number and agree in their paths share one.

    A pattern is for `re.fullmatch` on a module's name; each module of `units` matches exactly one.
    """
    families: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for unit in sorted(units, key=lambda unit: _between(unit.name)):
        paths = tuple(path for spec in unit.specs if (path := attribute(unit.name, spec.name)))
        families.setdefault((_NUMBER.sub("#", unit.name, count=1), paths), []).append(unit.name)
    complete = {key for key in families if [other for other, _ in families].count(key[0]) == 1}
    return {_pattern(key[0], names, key in complete): list(key[1]) for key, names in families.items()}


def _pattern(family: str, names: Sequence[str], complete: bool) -> str:
    before, numbered, after = family.partition("#")
    if not numbered:
        return _escape(family)
    numbers = [name[len(before) : len(name) - len(after)] for name in names]
    which = r"\d+" if complete else f"({'|'.join(numbers)})"
    return f"{_escape(before)}{which}{_escape(after)}"


def _escape(name: str) -> str:
    return name.replace(".", r"\.")


def _within(path: str) -> tuple[int, int, str]:
    """Sort key of an attribute path inside its unit."""
    if match := _VIT_LAYER.fullmatch(path):
        return int(match[1]), _place(_VIT_ORDER, match[2]), path
    known = next((k for k, name in enumerate(_LAYER_ORDER) if path in (name, name.partition(".")[2])), None)
    return (0, known, path) if known is not None else (1 << 30, 0, path)


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _between(unit: str) -> tuple[int, int, int, str]:
    """Sort key of a unit: token embeddings, layers, head, vision tower, the rest by name."""
    if match := re.match(r"language_model\.model\.layers\.(\d+)(?:\.(.+))?$", unit):
        return 1, int(match[1]), _place(("self_attn", "mlp", "mlp_moe_gen"), match[2] or ""), unit
    if unit.startswith("vit_model"):
        return 3, 0, 0, unit
    fixed = {"language_model.model.embed_tokens": 0, "language_model.lm_head": 2}
    return fixed.get(unit, 4), 0, 0, unit
