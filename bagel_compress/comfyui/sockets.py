"""Sockets and settings: ComfyUI-BAGEL's names and order, the official page's ranges and defaults."""

from __future__ import annotations

from typing import Any

from bagel.settings import MAX_CACHE_ORDER, RENORM_TYPES, SEEDS, SOLVERS
from bagel_compress.build.speed_settings import PRESETS

Spec = tuple[Any, dict[str, Any]]  # ComfyUI's: a type or the choices, and options


def number(kind: str, default: float, low: float, high: float, step: float, tip: str) -> Spec:
    return kind, {"default": default, "min": low, "max": high, "step": step, "tooltip": tip}


def prompt(default: str) -> Spec:
    return "STRING", {"multiline": True, "default": default}


MODEL: Spec = ("BAGEL_MODEL", {"tooltip": "from a BAGEL model loader"})
SEED = number("INT", 0, 0, min(SEEDS, 1 << 53) - 1, 1, "0 draws a new one every time")
CFG_TEXT = number("FLOAT", 4.0, 1.0, 8.0, 0.1, "text guidance; 1 is off")
CFG_IMAGE = number("FLOAT", 2.0, 1.0, 4.0, 0.1, "image guidance; 1 is off")
STEPS = number("INT", 50, 2, 100, 1, "points of the schedule: N points are N-1 steps")
TEMPERATURE = number("FLOAT", 0.3, 0.0, 1.0, 0.05, "of sampled text")
THINKING: Spec = ("BOOLEAN", {"default": False, "tooltip": "let the model plan in words first"})
IMAGE: Spec = ("IMAGE", {})
NO_PRESET = "none"
# Fewer evaluations of the network (docs/speed.md); the defaults are the official sampler.
SPEED: dict[str, Spec] = {
    "solver": (list(SOLVERS), {"default": "euler", "tooltip": "how a step is made; euler is the official one"}),
    "cache_every": number("INT", 1, 1, 8, 1, "evaluate every k-th step, forecast the others; 1 is off"),
    "cache_threshold": number("FLOAT", 0.0, 0.0, 0.5, 0.01, "evaluate once so much of the picture moved; 0 is off"),
    "cache_order": number("INT", 1, 0, MAX_CACHE_ORDER, 1, "order of the forecast"),
    "guidance_every": number("INT", 1, 1, 8, 1, "guidance at every k-th evaluation; 1 is off"),
}
PRESET: Spec = (
    [NO_PRESET, *PRESETS],
    {"default": NO_PRESET, "tooltip": "promised by the build's recipe; replaces the settings above and the steps"},
)


def sampling(interval: float, renorm: str, shift: float) -> dict[str, Spec]:
    """The optional settings of a picture, in ComfyUI-BAGEL's order, then ours."""
    return {
        "show_thinking": THINKING,
        "cfg_interval": number("FLOAT", interval, 0.0, 1.0, 0.1, "guidance acts from this time on, up to 1"),
        "timestep_shift": number("FLOAT", 3.0, 1.0, shift, 0.5, "more: longer on the rough layout"),
        "cfg_renorm_min": number("FLOAT", 0.0, 0.0, 1.0, 0.1, "1 turns renormalisation off"),
        "cfg_renorm_type": (list(RENORM_TYPES), {"default": renorm, "tooltip": "blurred edits: try global"}),
        "text_temperature": TEMPERATURE,
        **SPEED,
        "preset": PRESET,
    }


def inputs(required: dict[str, Spec], optional: dict[str, Spec]) -> dict[str, Any]:
    return {"required": required, "optional": optional, "hidden": {"node": "UNIQUE_ID"}}
