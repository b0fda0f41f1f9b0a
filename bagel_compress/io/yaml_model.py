"""The base class of immutable models, and the reader of YAML files that users write.

Recipes, targets, cases and batches are pydantic models with a fixed set of keys. Any fault in such a file is reported
in one sentence that names the file, the key, the value found and the expected one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bagel.errors import shown
from bagel_compress.errors import BagelCompressError

MAX_BYTES = 128 << 10  # of a YAML file
MAX_DEPTH = 50  # levels of nesting
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's loader is a hundred times as fast
Model = TypeVar("Model", bound=BaseModel)
Resolve = Callable[[type[BaseModel], Any], type[BaseModel]]


class FrozenModel(BaseModel):
    """An immutable model; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def meaning_digest(model: BaseModel) -> str:
    """sha256 (hex) of a model's values; independent of comments and of the order of keys in its file."""
    return hashlib.sha256(json.dumps(model.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def load_yaml(
    model: type[Model],
    path: Path,
    what: str,
    error: type[BagelCompressError],
    resolve: Resolve = lambda model, data: model,
) -> Model:
    """Reads a YAML file as a model (see `parse_yaml`); `what` is its kind ("recipe"). Raises `error` on any fault."""
    try:
        if path.exists() and not path.is_file():
            raise error(f"{what} {path} is no file.")
        if path.stat().st_size > MAX_BYTES:
            raise error(f"{what} {path} has {path.stat().st_size} bytes, more than {MAX_BYTES}; give another file.")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as fault:  # ValueError: no UTF-8, or a NUL in the name
        raise error(f"{what} {path} cannot be read ({fault}).") from None
    return parse_yaml(model, text, str(path), error, resolve)


def parse_yaml(
    model: type[Model],
    text: str,
    where: str,
    error: type[BagelCompressError],
    resolve: Resolve = lambda model, data: model,
) -> Model:
    """Parses YAML text as a model; `where` names the text in errors. Raises `error` on any fault.

    `resolve` maps a field's annotated base class and its data to the class that the data is parsed as, so that the
    message about an unknown key lists the keys of the right class.
    """
    try:
        data = plain_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as fault:
        # ValueError: impossible dates, integers of 5,000 digits; TypeError: a mapping as a key
        raise error(f"{where} is not YAML: {' '.join(str(fault).split())}.") from None
    if not isinstance(data, dict):
        keys = ", ".join(_keys(model))
        raise error(f"{where} holds a {type(data).__name__}, expected a mapping with the keys {keys}.")
    try:
        return model.model_validate(data)
    except ValidationError as fault:
        raise error(_sentence(fault, model, data, where, resolve)) from None


def plain_yaml(text: str) -> Any:
    """YAML as plain data. Raises YAMLError on aliases, by which a short text can expand to more than memory holds, and
    on deep nesting; ValueError, TypeError or RecursionError on values that Python cannot represent."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed, write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels of nesting")
    return yaml.load(text, _Loader)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the closest known word, or nothing if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _sentence(error: ValidationError, model: type[BaseModel], data: Any, where: str, resolve: Resolve) -> str:
    """The first fault of a validation as a sentence."""
    fault = error.errors(include_url=False)[0]
    path = [part for part in fault["loc"] if not str(part).startswith("function-")]
    known = _keys(_model_at(model, data, path[:-1], resolve))
    if len(path) > 1 and isinstance(path[1], int) and str(path[0]).endswith("s"):  # rules.2.codec -> "rule 3: codec"
        where, path = f"{where} {str(path[0]).removesuffix('s')} {path[1] + 1}", path[2:]
    key = ".".join(map(str, path))
    if fault["type"] == "extra_forbidden":
        unknown = str(path[-1])[:80]
        return (
            f"{where} has an unknown key {unknown!r}{did_you_mean(unknown, known)}; keys here are {', '.join(known)}."
        )
    if fault["type"] == "missing":
        return f"{where} has no {key}; it is required."
    if fault["type"] == "value_error":
        return f"{where}: {fault['ctx']['error']}."
    found = "" if isinstance(fault["input"], (dict, list)) else f", found {shown(fault['input'])}"
    at = f"{where}: {key}" if key else where
    return f"{at}: {fault['msg'][0].lower()}{fault['msg'][1:]}{found}."


def _model_at(model: type[BaseModel], data: Any, path: Sequence[Any], resolve: Resolve) -> type[BaseModel]:
    """The model class of the mapping at `path` in the data; of the nearest mapping above it if that is no model."""
    annotation: Any = model
    for part in path:
        data = data[part] if isinstance(data, (dict, list)) and _has(data, part) else None
        if isinstance(part, str):
            fields = model.model_fields
            named = {field.alias or name: field for name, field in fields.items()}
            annotation = named[part].annotation if part in named else annotation
        found = _models_in(annotation)
        model = resolve(found[0], data) if found else model
    return model


def _has(data: Any, part: Any) -> bool:
    return part in data if isinstance(data, dict) else isinstance(part, int) and part < len(data)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Model classes inside of an annotation such as `tuple[Rule, ...]` or `Source | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]
