"""Recipe: ordered rules that assign codecs to tensors by their roles; the first rule that matches a tensor applies.

A recipe has no paths and no devices, so the same recipe and source give the same bytes everywhere. Unknown keys, codecs
and values are errors that name the file, the rule and the probable correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from bagel.json_file import small_bytes
from bagel.layout import BLOCKS, COMPONENTS, EXPERTS, KINDS, Role
from bagel_compress.build.limits import METRICS, unknown_metric
from bagel_compress.build.speed_settings import SpeedPreset
from bagel_compress.codecs import by_name
from bagel_compress.codecs.base import Codec
from bagel_compress.errors import RecipeError
from bagel_compress.io.packaged import find_recipe, target_files
from bagel_compress.io.safe_paths import is_file
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.io.yaml_model import (
    MAX_BYTES,
    FrozenModel,
    did_you_mean,
    load_yaml,
    meaning_digest,
    parse_yaml,
    plain_yaml,
)

_CHOICES = {"component": COMPONENTS, "expert": EXPERTS, "kind": KINDS, "block": BLOCKS}


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
        raise ValueError(f"unknown codec {name!r}{did_you_mean(name, known)}; codecs are {', '.join(known)}")
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


class Match(FrozenModel):
    """The tensors of a rule: all given fields have to match; a list matches any of its values; `{}` matches all."""

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
                    raise ValueError(
                        f"{field} is {value!r}{did_you_mean(value, choices)}, expected {', '.join(choices)}"
                    )

    def takes(self, spec: TensorSpec, role: Role) -> bool:
        """True if every given field matches the tensor."""
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


class Rule(FrozenModel):
    """A match, and the codec of the tensors that it matches."""

    match: Match
    codec: Annotated[SerializeAsAny[Codec], BeforeValidator(parse_codec)]


class SourceRepo(FrozenModel):
    """The checkpoint that the recipe was written for; the default source."""

    repo: str
    revision: str | None = None


class Limits(FrozenModel, populate_by_name=True):
    """The limits for parity: a class of limits, and single values that replace the class's."""

    level: Literal["lossless", "16-bit", "8-bit", "4-bit"] = Field("8-bit", alias="class")
    overrides: dict[str, float] = Field(default_factory=dict, description="metric name -> limit")


class Recipe(FrozenModel):
    """Ordered rules that assign codecs to tensors by their roles; the first rule that matches a tensor applies.

    A frozen value without paths and devices: the same recipe and source give the same bytes everywhere.
    `load` takes a YAML file or a packaged name, `parse` takes text. Raises RecipeError on anything unknown.

        recipe = bc.Recipe.load("nf4-12gb")
        print(recipe.digest, [str(rule.match) for rule in recipe.rules])
        mine = recipe.model_copy(update={"name": "mine"})
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    summary: str = ""
    source: SourceRepo | None = None
    rules: tuple[Rule, ...] = Field(min_length=1)
    budget_gb: float | None = Field(None, gt=0, description="largest size of all weight shards together, in 1e9 bytes")
    limits: Limits = Field(default_factory=lambda: Limits.model_validate({}))
    fast: dict[Literal["exact", "balanced", "fast"], SpeedPreset] = Field(
        default_factory=dict, description="presets of the sampler that `validate` holds to the limits (docs/speed.md)"
    )
    targets: tuple[str, ...] = ()
    export: str | None = None
    card: str = ""
    serve: Literal["vllm-omni"] | None = Field(
        None, description="a server that loads the build: the index lists the VAE, preprocessor_config.json is there"
    )
    non_finite: Literal["refused", "kept"] = Field(
        "refused", description="NaN and infinity in weights that are stored without loss; no model needs them"
    )

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves unset `fast`, `serve` and `non_finite` out, so that the digests of older recipes stay valid."""
        fields: dict[str, Any] = handler(self)
        unsaid: dict[str, Any] = {"fast": {}, "serve": None, "non_finite": "refused"}
        return {name: value for name, value in fields.items() if name not in unsaid or value != unsaid[name]}

    @model_validator(mode="after")
    def _served(self) -> Recipe:
        other = next((rule.codec.format for rule in self.rules if not rule.codec.served), None)
        if self.serve and other is not None:
            raise ValueError(
                f"serve is {self.serve}, whose loader takes raw, fp8 with dialect vllm and int4 with dialect "
                f"auto-round, found codec {other}; remove serve or change the codec"
            )
        return self

    @property
    def digest(self) -> str:
        """sha256 of the recipe's values; independent of comments and the order of keys."""
        return meaning_digest(self)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """A YAML file, or the name of a recipe that comes with the package ("nf4-12gb").

        Raises RecipeError, which names file, rule, the value found and the expected one.
        """
        file = find_recipe(str(path))
        recipe = load_yaml(cls, file, "recipe", RecipeError, _codec_class)
        recipe._check_names(str(file))
        return recipe

    @classmethod
    def parse(cls, text: str, where: str) -> Recipe:
        """Reads YAML text; `where` names it in errors."""
        recipe = parse_yaml(cls, text, where, RecipeError, _codec_class)
        recipe._check_names(where)
        return recipe

    def _check_names(self, where: str) -> None:
        """Raises RecipeError on a metric, target or export that does not exist.

        Only recipes that are read for a build are checked, not those in manifests: an artifact stays readable when a
        later version has other metrics and targets. A target may be a file `NAME.yaml` in the recipe's folder.
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
    """Raises RecipeError unless the target is a packaged one or its file exists."""
    beside = Path(where.partition(": ")[0]).parent
    own = beside / f"{name.removesuffix('.yaml')}.yaml" if Path(name).name == name else Path(name)
    if name not in known and not is_file(own) and not is_file(name):
        raise RecipeError(
            f"{where}: {name!r} is unknown{did_you_mean(name, known)}; expected one of {', '.join(known)}, or a file"
            f" {own.name} beside the recipe."
        )
    file = own if is_file(own) else Path(name)
    if name not in known and (written := _name_in(file)) != file.stem:
        raise RecipeError(
            f"{where}: {file} calls itself {written!r}; name it {file.stem}, as the recipe and the file do."
        )


def _name_in(file: Path) -> str:
    try:
        return str(plain_yaml(small_bytes(file, MAX_BYTES).decode())["name"])
    except (OSError, ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError):
        return ""


def _codec_class(model: type[BaseModel], data: Any) -> type[BaseModel]:
    """The class of the codec that a mapping names, for error messages; a rule's field is annotated with the base."""
    return type(parse_codec(data["format"])) if model is Codec and isinstance(data, dict) else model
