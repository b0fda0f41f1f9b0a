"""Settings of a run: how an image is sampled and how text is decoded. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from bagel.errors import BagelError

RENORM_TYPES = ("global", "channel", "text_channel")
SOLVERS = ("euler", "ab2", "heun", "dpm2")
MAX_CACHE_ORDER = 2
MAX_SHIFT = 1e6  # far beyond use; from 1e38 on the schedule would leave fp32
MIN_TEMPERATURE = 1e-6  # below, sampling is greedy decoding, and logits / temperature would soon leave fp32
SEEDS = 1 << 63  # how many there are: what the generators of torch and numpy both take


@dataclass(frozen=True, slots=True)
class FlowSettings:
    """How an image is sampled. Defaults: the published text-to-image settings, image guidance off.

    num_timesteps counts the points of the schedule, ends included: N points are N-1 network evaluations. Guidance acts
    where cfg_interval[0] < t <= cfg_interval[1] on the shifted time. Scales of 1 or less are off, and without text
    guidance image guidance is off as well. cfg_renorm_min = 1 turns renormalisation off.

    The rest trades accuracy for speed; the defaults are the official sampler, to the bit. `solver` is how a step is
    made from velocities (bagel/solvers.py). `cache_every`, `cache_threshold`, `cache_order` and `guidance_every` say
    when the network is not evaluated but forecast (bagel/step_cache.py). Raises BagelError on values that cannot be
    meant, NaN and infinity among them.
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: str = "global"
    solver: str = "euler"
    cache_every: int = 1
    cache_threshold: float = 0.0
    cache_order: int = 1
    guidance_every: int = 1

    def __post_init__(self) -> None:
        if self.cfg_renorm_type not in RENORM_TYPES:
            hint = " ('local' of older menus is 'channel')" if self.cfg_renorm_type == "local" else ""
            raise BagelError(
                f"cfg_renorm_type is {self.cfg_renorm_type!r}, expected one of {', '.join(RENORM_TYPES)}{hint}."
            )
        _check_count("num_timesteps", self.num_timesteps, 2, " (N points make N-1 steps)")
        if not 0 < _finite("timestep_shift", self.timestep_shift) <= MAX_SHIFT:
            raise BagelError(
                f"timestep_shift is {self.timestep_shift}, expected a positive number of at most {MAX_SHIFT:.0f}."
            )
        _finite("cfg_text_scale", self.cfg_text_scale)
        _finite("cfg_img_scale", self.cfg_img_scale)
        if not 0 <= _finite("cfg_renorm_min", self.cfg_renorm_min) <= 1:
            raise BagelError(f"cfg_renorm_min is {self.cfg_renorm_min}, expected a number from 0 to 1.")
        low, high = (_finite("cfg_interval", side) for side in self.cfg_interval)
        if low > high:
            raise BagelError(f"cfg_interval is {low} to {high}, expected its lower end first.")
        self._check_speed()

    def _check_speed(self) -> None:
        if self.solver not in SOLVERS:
            raise BagelError(f"solver is {self.solver!r}, expected one of {', '.join(SOLVERS)}.")
        _check_count("cache_every", self.cache_every, 1, " (1 evaluates the network at every step)")
        _check_count("guidance_every", self.guidance_every, 1, " (1 evaluates every branch at every step)")
        _check_count("cache_order", self.cache_order, 0)
        if self.cache_order > MAX_CACHE_ORDER:
            raise BagelError(f"cache_order is {self.cache_order}, expected 0 to {MAX_CACHE_ORDER}.")
        if not 0 <= _finite("cache_threshold", self.cache_threshold) < 1:
            raise BagelError(f"cache_threshold is {self.cache_threshold}, expected 0 (off) to less than 1.")
        if self.cache_threshold and self.cache_every > 1:
            raise BagelError(
                f"cache_every is {self.cache_every} and cache_threshold {self.cache_threshold}; give one of them, both"
                " say when the network is evaluated."
            )
        if self.solver == "heun" and self.forecasts:
            raise BagelError("solver heun evaluates the network twice at a time and takes no cache; use ab2 with one.")

    @property
    def forecasts(self) -> bool:
        """Whether some velocities are forecast instead of evaluated."""
        return self.cache_every > 1 or self.cache_threshold > 0 or self.guidance_every > 1

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
        _check_count("max_tokens", self.max_tokens, 1)
        if _finite("temperature", self.temperature) < MIN_TEMPERATURE and self.do_sample:
            raise BagelError(
                f"temperature is {self.temperature}, expected at least {MIN_TEMPERATURE:g} when sampling;"
                " without sampling the likeliest token is taken."
            )


def check_seed(seed: int) -> int:
    """Returns the seed. Raises BagelError if it is outside 0 to 2^63 - 1, the range every generator accepts."""
    if type(seed) is not int or not 0 <= seed < SEEDS:
        raise BagelError(f"the seed is {str(seed)[:40]}, expected a whole number from 0 to 2^63 - 1.")
    return seed


def _check_count(name: str, value: int, least: int, why: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BagelError(f"{name} is {value}, expected at least {least}{why}.")


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise BagelError(f"{name} is {value}, expected a finite number.")
    return value


EDIT_FLOW = FlowSettings(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel")
