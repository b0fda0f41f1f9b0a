"""Writes a recipe as readable YAML: two lines per rule, without defaults."""

from __future__ import annotations

from typing import Any

import yaml

from bagel_compress.build.recipe import Match, Recipe
from bagel_compress.codecs.base import Codec
from bagel_compress.codecs.calibrated import Gptq


def recipe_text(recipe: Recipe, reasons: str) -> str:
    """The text of the file: `reasons` as comments, then the recipe. Parsing it gives a recipe with the same digest."""
    lines = [f"# {line}".rstrip() for line in reasons.splitlines()]
    data = recipe.model_dump(mode="json", exclude_defaults=True, by_alias=True)
    lines += [f"{key}: {_inline(value)}" for key, value in data.items() if key != "rules"]
    lines.append("rules:")
    for rule in recipe.rules:
        lines += [f"  - match: {_inline(_match(rule.match))}", f"    codec: {_inline(_codec(rule.codec))}"]
    return "\n".join(lines) + "\n"


def _match(match: Match) -> dict[str, Any]:
    fields = match.model_dump(mode="json", exclude_none=True)
    if match.layer is not None:
        fields["layer"] = [a if a == b else f"{a}-{b}" for a, b in match.layer]
    return {key: value[0] if len(value) == 1 else value for key, value in fields.items()}


def _codec(codec: Codec) -> Any:
    """The name of the format, or a mapping with the fields that are not at their defaults."""
    given = {name for name, value in codec if value != type(codec).model_fields[name].default} - {"format"}
    fields = {"format": codec.format} | codec.model_dump(mode="json", include=given)
    rounding = getattr(codec, "rounding", None)
    if isinstance(rounding, Gptq):
        others = rounding.model_dump(mode="json", exclude_defaults=True)
        fields["rounding"] = {"method": rounding.method} | others if others else rounding.method
    return fields if given else codec.format


def _inline(data: Any) -> str:
    """YAML on one line."""
    text = yaml.safe_dump(data, default_flow_style=True, sort_keys=False, width=100_000)
    return text.strip().removesuffix("...").strip()
