"""A YAML file as a pydantic model; what is wrong with it as one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from bagel_compress.errors import TargetError

Model = TypeVar("Model", bound=BaseModel)


def load_yaml(model: type[Model], path: Path, what: str) -> Model:
    """A YAML file as a model. Raises TargetError, one sentence."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"{what} {path} cannot be read ({error}).") from None
    except yaml.YAMLError as error:
        raise TargetError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise TargetError(f"{path} holds a {type(data).__name__}, expected the keys of a {what}.")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise TargetError(_sentence(model, path, error)) from None


def _sentence(model: type[BaseModel], path: Path, error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{path} has an unknown key {where!r}; keys are {', '.join(model.model_fields)}."
    if fault["type"] == "missing":
        return f"{path} has no {where}; it is required."
    if fault["type"] == "value_error":
        return f"{path}: {fault['ctx']['error']}."
    found = "" if isinstance(fault["input"], (dict, list)) else f", found {fault['input']!r}"
    return f"{path}: {where}: {fault['msg'][0].lower()}{fault['msg'][1:]}{found}."
