"""The sampler presets of a build's recipe (docs/speed.md), by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bagel.settings import FlowSettings
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.build.speed_settings import SpeedPreset
from bagel_compress.errors import InputError


def presets_of(folder: Path) -> Mapping[str, SpeedPreset]:
    """Name -> preset of the build in a folder; empty if it is no artifact."""
    recipe = Artifact.open(folder).manifest.recipe if (folder / MANIFEST).is_file() else None
    return {} if recipe is None else {str(name): preset for name, preset in recipe.fast.items()}


def with_preset(flow: FlowSettings, preset: str, folder: Path) -> FlowSettings:
    """The settings with those of a preset of the folder's build. Raises InputError if the build has no such preset."""
    presets = presets_of(folder)
    if preset not in presets:
        known = ", ".join(presets) or "none"
        raise InputError(f"{folder} promises no preset {preset!r} (its presets: {known}).")
    return presets[preset].applied(flow)
