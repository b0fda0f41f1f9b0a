"""Sampler settings that trade accuracy for speed, as cases, targets and recipes write them.

bagel.settings.FlowSettings explains the values. A recipe's `fast:` block defines presets of them:

    fast:
      balanced: {num_timesteps: 50, cache_every: 2}
      fast: {num_timesteps: 50, cache_every: 3}

`bagel-compress speed` measures the error and time of such settings; `validate` draws with every preset of the recipe
and applies the recipe's limits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from bagel.errors import BagelError
from bagel.settings import FlowSettings
from bagel_compress.io.yaml_model import FrozenModel

PRESETS = ("exact", "balanced", "fast")


class SpeedSettings(FrozenModel):
    """Solver and step cache; the defaults are the official sampler's."""

    solver: Literal["euler", "ab2", "heun", "dpm2"] = "euler"
    cache_every: int = Field(default=1, ge=1)
    cache_threshold: float = Field(default=0.0, ge=0, lt=1)
    cache_order: int = Field(default=1, ge=0, le=2)
    guidance_every: int = Field(default=1, ge=1)


class SpeedPreset(SpeedSettings):
    """Speed settings that replace those of a picture's other settings."""

    num_timesteps: int | None = Field(default=None, ge=2, description="points of the schedule; None: as they are")

    def applied(self, flow: FlowSettings) -> FlowSettings:
        """`flow` with these settings."""
        return replace(flow, **self.model_dump(exclude_none=True))

    @model_validator(mode="after")
    def _possible(self) -> Self:
        checked(FlowSettings, **self.model_dump(exclude_none=True))
        return self

    def __str__(self) -> str:
        """The settings that differ from the official sampler's, as text: `ab2, 26 points`."""
        words: list[str] = [] if self.solver == "euler" else [self.solver]
        words += [] if self.num_timesteps is None else [f"{self.num_timesteps} points"]
        if self.cache_every > 1:
            words.append(f"cache_every {self.cache_every}")
        if self.cache_threshold:
            words.append(f"cache_threshold {self.cache_threshold:g}")
        if self.guidance_every > 1:
            words.append(f"guidance_every {self.guidance_every}")
        if self.cache_every > 1 or self.cache_threshold or self.guidance_every > 1:
            words.append(f"cache_order {self.cache_order}")
        return ", ".join(words) or "official sampler"


def checked(settings: Callable[..., object], **values: object) -> None:
    """Raises ValueError, for pydantic, on settings that the sampler would refuse."""
    try:
        settings(**values)
    except BagelError as error:
        raise ValueError(str(error).rstrip(".")) from None
