"""Recipe: what the weights become. Ordered rules, each a match on a tensor's role and a codec; the first match wins.

A recipe holds no paths and no devices, so the same recipe and source give the same bytes everywhere. Unknown keys,
codecs and values are errors that name the file, the rule and what was probably meant.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError

from bagel.layout import BLOCKS, COMPONENTS, EXPERTS, KINDS, Role
from bagel_compress.build.limits import METRICS, unknown_metric
from bagel_compress.codecs import by_name
from bagel_compress.codecs.base import Codec
from bagel_compress.codecs.calibrated import Gptq
from bagel_compress.errors import RecipeError
from bagel_compress.io.packaged import target_files
from bagel_compress.io.tensor_spec import TensorSpec

_CHOICES = {"component": COMPONENTS, "expert": EXPERTS, "kind": KINDS, "block": BLOCKS}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def parse_codec(value: Any) -> Codec:
    """`nf4` or `{format: nf4, double_quant: true}` -> the codec. Raises ValueError with the known formats."""
    if isinstance(value, Codec):
        return value
    fields = {"format": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or "format" not in fields:
        raise ValueError(f"codec is {value!r}, expected a format name or a mapping with `format`")
    known = by_name()
    name = str(fields["format"])
    if name not in known:
        raise ValueError(f"unknown codec {name!r}{_meant(name, known)}; codecs are {', '.join(known)}")
    return known[name].model_validate(fields)


def _as_tuple(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


def _as_ranges(value: Any) -> Any:
    """`3`, `"0-3"` or a list of both -> ((first, last), ...)."""
    return tuple(_range(item) for item in _as_tuple(value))


def _range(item: Any) -> tuple[int, int]:
    if isinstance(item, (list, tuple)) and len(item) == 2 and all(type(i) is int for i in item):
        return (item[0], item[1])
    first, dash, last = str(item).partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
        raise ValueError(f"layer is {item!r}, expected a number such as 3 or a range such as 0-3")
    return (int(first), int(last or first))


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Match(_Frozen):
    """Which tensors a rule takes: all given fields must hold; a list means any of its values; `{}` takes everything."""

    component: Names | None = Field(None, description="llm, vit, connector, latent, time")
    expert: Names | None = Field(None, description="und, gen, shared")
    kind: Names | None = Field(None, description="linear, bias, norm, embedding, position, head")
    block: Names | None = Field(None, description="attention, mlp, none")
    layer: Annotated[tuple[tuple[int, int], ...], BeforeValidator(_as_ranges)] | None = Field(
        None, description="3, 0-3, or a list of both; counts decoder layers in llm, encoder layers in vit"
    )
    name: Names | None = Field(None, description="glob on the full tensor name, such as *.down_proj.weight")

    def model_post_init(self, context: Any) -> None:
        for field, choices in _CHOICES.items():
            for value in getattr(self, field) or ():
                if value not in choices:
                    raise ValueError(f"{field} is {value!r}{_meant(value, choices)}, expected {', '.join(choices)}")

    def takes(self, spec: TensorSpec, role: Role) -> bool:
        """True if the tensor has every asked property."""
        for field in _CHOICES:
            wanted = getattr(self, field)
            if wanted is not None and getattr(role, field) not in wanted:
                return False
        if self.layer is not None and not any(role.layer is not None and a <= role.layer <= b for a, b in self.layer):
            return False
        return self.name is None or any(fnmatchcase(spec.name, pattern) for pattern in self.name)

    def __str__(self) -> str:
        fields = self.model_dump(exclude_none=True)
        if self.layer is not None:
            fields["layer"] = [str(a) if a == b else f"{a}-{b}" for a, b in self.layer]
        return ", ".join(f"{field}: {' | '.join(values)}" for field, values in fields.items()) or "everything"


class Rule(_Frozen):
    """A match and the codec of what it takes."""

    match: Match
    codec: Annotated[SerializeAsAny[Codec], BeforeValidator(parse_codec)]


class Source(_Frozen):
    """The checkpoint that the recipe was written for; used when no other is named."""

    repo: str
    revision: str | None = None


class Limits(_Frozen):
    """What parity must hold: the limits of a class, and single values that replace them."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    level: Literal["lossless", "16-bit", "8-bit", "4-bit"] = Field("8-bit", alias="class")
    overrides: dict[str, float] = Field(default_factory=dict, description="metric name -> limit")


class Recipe(_Frozen):
    """One published variant."""

    name: str = Field(pattern=r"^[\w.-]+$")
    summary: str = ""
    source: Source | None = None
    rules: tuple[Rule, ...] = Field(min_length=1)
    budget_gb: float | None = Field(None, gt=0, description="largest size of all weight shards together, in 1e9 bytes")
    limits: Limits = Field(default_factory=lambda: Limits.model_validate({}))
    targets: tuple[str, ...] = ()
    export: str | None = None
    card: str = ""

    @property
    def digest(self) -> str:
        """sha256 of the meaning: comments and order of keys do not matter, every value does."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a YAML file. Raises RecipeError, one sentence with file, rule, found and expected."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path} cannot be read ({error}).") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> Recipe:
        """Reads YAML text; `where` names it in errors."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{where} is not YAML: {' '.join(str(error).split())}.") from None
        if not isinstance(data, dict):
            raise RecipeError(f"{where} holds a {type(data).__name__}, expected a mapping with name and rules.")
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(_sentence(error, data, where)) from None
        recipe._check_names(where)
        return recipe

    def _check_names(self, where: str) -> None:
        """Raises RecipeError on a metric, target or export that does not exist.

        This is asked of recipes that are read for a build, not of those in manifests: an artifact stays readable when
        a later version has other metrics and targets. A target may lie beside the recipe as `NAME.yaml`.
        """
        for metric in self.limits.overrides:
            if metric not in METRICS:
                raise RecipeError(f"{where}: limits: {unknown_metric(metric)}.")
        known = target_files()
        for name in self.targets:
            _check_target(name, list(known), f"{where}: targets")
        if self.export:
            exports = [name for name, file in known.items() if "export" in yaml.safe_load(file.read_text("utf-8"))]
            _check_target(self.export, exports, f"{where}: export")


def _check_target(name: str, known: Sequence[str], where: str) -> None:
    """Raises RecipeError unless the target comes with the package or its file is there."""
    own = Path(where.partition(": ")[0]).with_name(f"{name.removesuffix('.yaml')}.yaml")
    if name not in known and not own.is_file() and not Path(name).is_file():
        raise RecipeError(
            f"{where}: {name!r} is unknown{_meant(name, known)}; expected one of {', '.join(known)}, or a file"
            f" {own.name} beside the recipe."
        )


def _sentence(error: ValidationError, data: dict[str, Any], where: str) -> str:
    """The first fault of a validation as one sentence."""
    fault = error.errors(include_url=False)[0]
    path = [str(part) for part in fault["loc"] if not str(part).startswith("function-")]
    known = _known_keys(path, data)
    if path[:1] == ["rules"] and len(path) > 1:
        where, path = f"{where} rule {int(path[1]) + 1}", path[2:]
    if fault["type"] == "extra_forbidden":
        return f"{where} has an unknown key {path[-1]!r}{_meant(path[-1], known)}; keys here are {', '.join(known)}."
    if fault["type"] == "missing":
        return f"{where} has no {'.'.join(path)}; it is required."
    if fault["type"] == "value_error":
        return f"{where}: {fault['ctx']['error']}."
    found = "" if isinstance(fault["input"], (dict, list)) else f", found {fault['input']!r}"
    return f"{where}: {'.'.join(path)}: {fault['msg'][0].lower()}{fault['msg'][1:]}{found}."


def _known_keys(path: list[str], data: dict[str, Any]) -> list[str]:
    """Keys that are allowed beside the last one of `path`."""
    model: type[BaseModel] = Recipe
    if path[:1] == ["rules"] and len(path) == 3:
        model = Rule
    elif path[:1] == ["rules"] and path[2:3] == ["match"]:
        model = Match
    elif path[:1] == ["rules"] and path[2:5] == ["codec", "rounding", "gptq"]:
        model = Gptq
    elif path[:1] == ["rules"] and path[2:3] == ["codec"]:
        model = type(parse_codec(data["rules"][int(path[1])]["codec"]["format"]))
    elif len(path) == 2:
        nested: dict[str, type[BaseModel]] = {"source": Source, "limits": Limits}
        model = nested.get(path[0], Recipe)
    return [field.alias or name for name, field in model.model_fields.items()]


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
