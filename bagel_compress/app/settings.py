"""Every setting of the page in one table: its range and its default, as the official page has them. No torch.

ADVANCED is what the official page has not: solvers and the step cache (docs/speed.md), at first the official sampler.

The official page offers a renorm type `local`, which its sampler refuses; the right name is `channel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bagel.settings import MAX_CACHE_ORDER, SOLVERS, FlowSettings, TextSettings

RATIOS = {"1:1": (1024, 1024), "4:3": (1024, 768), "3:4": (768, 1024), "16:9": (1024, 576), "9:16": (576, 1024)}
FULL = 1024  # pixels of the longer side; a smaller model draws the same ratios at its own size
LARGEST_SEED = 1_000_000


@dataclass(frozen=True, slots=True)
class Setting:
    """A control: a slider from `low` to `high`, a choice among `choices`, or a box to tick."""

    name: str
    default: Any
    low: float = 0.0
    high: float = 0.0
    step: float = 0.1
    choices: tuple[str, ...] = ()


_SEED = Setting("seed", 0, 0, LARGEST_SEED, 1)  # 0: a random one
_STEPS = Setting("num_timesteps", 50, 10, 100, 1)
_CFG_TEXT = Setting("cfg_text_scale", 4.0, 1.0, 8.0)
_RENORM = ("global", "channel", "text_channel")
_RENORM_MIN = Setting("cfg_renorm_min", 0.0, 0.0, 1.0)
_THINKING = (
    Setting("do_sample", False),
    Setting("max_tokens", 1024, 64, 4096, 1),
    Setting("temperature", 0.3, 0.1, 1.0),
)

SETTINGS: dict[str, tuple[Setting, ...]] = {
    "draw": (
        _SEED,
        Setting("ratio", "1:1", choices=tuple(RATIOS)),
        _CFG_TEXT,
        Setting("cfg_interval_start", 0.4, 0.0, 1.0),
        Setting("cfg_renorm_type", "global", choices=_RENORM),
        _RENORM_MIN,
        _STEPS,
        Setting("timestep_shift", 3.0, 1.0, 5.0, 0.5),
        *_THINKING,
    ),
    "edit": (
        _SEED,
        _CFG_TEXT,
        Setting("cfg_img_scale", 2.0, 1.0, 4.0),
        Setting("cfg_interval_start", 0.0, 0.0, 1.0),
        Setting("cfg_renorm_type", "text_channel", choices=_RENORM),
        _RENORM_MIN,
        _STEPS,
        Setting("timestep_shift", 3.0, 1.0, 10.0, 0.5),
        *_THINKING,
    ),
    "ask": (
        Setting("do_sample", False),
        Setting("temperature", 0.3, 0.0, 1.0),
        Setting("max_tokens", 512, 64, 4096, 1),
    ),
}
NO_PRESET = "none"
_SPEED = (
    Setting("preset", NO_PRESET, choices=(NO_PRESET,)),  # and those that the build's recipe promises
    Setting("solver", "euler", choices=SOLVERS),
    Setting("cache_every", 1, 1, 8, 1),
    Setting("cache_threshold", 0.0, 0.0, 0.5, 0.01),
    Setting("cache_order", 1, 0, MAX_CACHE_ORDER, 1),
    Setting("guidance_every", 1, 1, 8, 1),
)
ADVANCED: dict[str, tuple[Setting, ...]] = {"draw": _SPEED, "edit": _SPEED, "ask": ()}
_COUNTS = ("num_timesteps", "cache_every", "cache_order", "guidance_every")
_FLOW = (
    "num_timesteps", "timestep_shift", "cfg_text_scale", "cfg_img_scale", "cfg_renorm_min", "cfg_renorm_type", "solver",
    "cache_every", "cache_threshold", "cache_order", "guidance_every",
)  # fmt: skip


def settings_of(tab: str) -> tuple[Setting, ...]:
    """All controls of a tab, the official ones first."""
    return (*SETTINGS[tab], *ADVANCED[tab])


def flow_of(values: Mapping[str, Any]) -> FlowSettings:
    """The sampler's settings from the controls' values. Raises BagelError on values that cannot be meant."""
    given: dict[str, Any] = {name: values[name] for name in _FLOW if name in values}
    given |= {name: int(given[name]) for name in _COUNTS if name in given}
    return FlowSettings(**given, cfg_interval=(values["cfg_interval_start"], 1.0))


def text_of(values: Mapping[str, Any]) -> TextSettings:
    """How text is decoded, from the controls' values. Raises BagelError."""
    return TextSettings(int(values["max_tokens"]), bool(values["do_sample"]), float(values["temperature"]))


def sizes_of(largest: int, stride: int) -> dict[str, tuple[int, int]]:
    """Ratio -> (width, height) for a model whose pictures have at most `largest` pixels a side, whole strides each."""
    scale = min(1.0, largest / FULL)
    return {
        ratio: (max(stride, round(w * scale / stride) * stride), max(stride, round(h * scale / stride) * stride))
        for ratio, (w, h) in RATIOS.items()
    }
