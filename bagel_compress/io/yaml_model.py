"""One base class for frozen models, and one reader of the YAML files that users write.

Recipes, targets, cases and batches are pydantic models that cannot be changed and know their keys. Their files are read
here: whatever is wrong with one ends in a single sentence that names the file, the key, what was found and what was
expected.
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

MOST = 128 << 10  # bytes of a file that a person wrote
DEEPEST = 50  # levels of it
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is a hundred times faster
Model = TypeVar("Model", bound=BaseModel)
Resolve = Callable[[type[BaseModel], Any], type[BaseModel]]


class FrozenModel(BaseModel):
    """A value that cannot be changed; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def meaning_digest(model: BaseModel) -> str:
    """sha256 (hex) of a model's values: comments and the order of keys in its file do not matter, every value does."""
    return hashlib.sha256(json.dumps(model.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def load_yaml(
    model: type[Model],
    path: Path,
    what: str,
    error: type[BagelCompressError],
    resolve: Resolve = lambda model, data: model,
) -> Model:
    """A YAML file as a model; `what` is its kind ("recipe"); see `parse_yaml`. Raises `error` on any fault."""
    try:
        if path.exists() and not path.is_file():
            raise error(f"{what} {path} is no file.")
        if path.stat().st_size > MOST:
            raise error(f"{what} {path} has {path.stat().st_size} bytes, more than {MOST}; give another file.")
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
    """YAML text as a model; `where` names the text in errors. Raises `error`, in one sentence, on any fault.

    `resolve` gives the class that some data really is of, where a field is annotated with a base class of it: the
    sentence about an unknown key then lists the right keys.
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
    """YAML as data. Raises YAMLError on aliases, of which a few lines stand for more than memory holds, and on endless
    nesting; ValueError, TypeError or RecursionError on values Python cannot hold."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken, write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"more than {DEEPEST} levels of nesting")
    return yaml.load(text, _Loader)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the closest known word, or nothing if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _sentence(error: ValidationError, model: type[BaseModel], data: Any, where: str, resolve: Resolve) -> str:
    """The first fault of a validation as one sentence."""
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
    """The model that the mapping at `path` of the data was read as; the nearest one above it if it is none."""
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
