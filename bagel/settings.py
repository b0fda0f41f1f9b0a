"""What a run can be told: how an image is sampled and how text is decoded. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bagel.errors import BagelError

RENORM_TYPES = ("global", "channel", "text_channel")


@dataclass(frozen=True, slots=True)
class FlowSettings:
    """How an image is sampled. Defaults: the published text-to-image settings, image guidance off.

    num_timesteps counts the points of the schedule, ends included: N points are N-1 network evaluations. Guidance acts
    where cfg_interval[0] < t <= cfg_interval[1] on the shifted time. Scales of 1 or less are off, and without text
    guidance image guidance is off as well. cfg_renorm_min = 1 turns renormalisation off.
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: str = "global"

    def __post_init__(self) -> None:
        if self.cfg_renorm_type not in RENORM_TYPES:
            hint = " ('local' of older menus is 'channel')" if self.cfg_renorm_type == "local" else ""
            raise BagelError(
                f"cfg_renorm_type is {self.cfg_renorm_type!r}, expected one of {', '.join(RENORM_TYPES)}{hint}."
            )
        if self.num_timesteps < 2:
            raise BagelError(f"num_timesteps is {self.num_timesteps}, expected at least 2 (N points make N-1 steps).")
        if self.timestep_shift <= 0:
            raise BagelError(f"timestep_shift is {self.timestep_shift}, expected a positive number.")

    def guides(self, t: Any) -> bool:
        """Whether guidance acts at (shifted) time t: lower bound strict, upper inclusive."""
        low, high = self.cfg_interval
        return bool(t > low) and bool(t <= high)


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How text is decoded. `max_tokens` counts the start token, which is fed but never shown."""

    max_tokens: int = 1000
    do_sample: bool = False
    temperature: float = 0.3

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise BagelError(f"max_tokens is {self.max_tokens}, expected at least 1.")
        if self.do_sample and self.temperature <= 0:
            raise BagelError(f"temperature is {self.temperature}, expected more than 0 when sampling.")


EDIT_FLOW = FlowSettings(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel")
