"""The sampler presets of a build's recipe (docs/speed.md), by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bagel.json_file import small_bytes
from bagel.settings import FlowSettings
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import EXPORT_MANIFEST, MANIFEST
from bagel_compress.build.recipe import Recipe
from bagel_compress.build.speed_settings import SpeedPreset
from bagel_compress.errors import ArtifactError, InputError


def presets_of(folder: Path) -> Mapping[str, SpeedPreset]:
    """Name -> preset of the build in a folder, or of the build that an export was made from; empty for a checkpoint.

    Raises ArtifactError on a damaged manifest.
    """
    recipe = _recipe(folder)
    return {} if recipe is None else {str(name): preset for name, preset in recipe.fast.items()}


def with_preset(flow: FlowSettings, preset: str, folder: Path) -> FlowSettings:
    """The settings with those of a preset of the folder's build. Raises InputError if the build has no such preset.

    Every model has `exact`, the official sampler.
    """
    presets = {"exact": SpeedPreset()} | dict(presets_of(folder))
    if preset not in presets:
        known = ", ".join(presets) or "none"
        raise InputError(f"{folder} has no preset {preset!r} (its presets: {known}).")
    return presets[preset].applied(flow)


def _recipe(folder: Path) -> Recipe | None:
    if (folder / MANIFEST).is_file():
        return Artifact.open(folder).manifest.recipe
    if not (folder / EXPORT_MANIFEST).is_file():
        return None
    try:
        found = json.loads(small_bytes(folder / EXPORT_MANIFEST))["source"]["recipe"]
        return None if found is None else Recipe.model_validate(found)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / EXPORT_MANIFEST} is damaged ({error}); export it again.") from None
