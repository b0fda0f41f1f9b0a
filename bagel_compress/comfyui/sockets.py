"""Sockets and settings: ComfyUI-BAGEL's names and order, the official page's ranges and defaults."""

from __future__ import annotations

from typing import Any

from bagel.settings import RENORM_TYPES, SEEDS

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


def sampling(interval: float, renorm: str, shift: float) -> dict[str, Spec]:
    """The optional settings of a picture, in ComfyUI-BAGEL's order."""
    return {
        "show_thinking": THINKING,
        "cfg_interval": number("FLOAT", interval, 0.0, 1.0, 0.1, "guidance acts from this time on, up to 1"),
        "timestep_shift": number("FLOAT", 3.0, 1.0, shift, 0.5, "more: longer on the rough layout"),
        "cfg_renorm_min": number("FLOAT", 0.0, 0.0, 1.0, 0.1, "1 turns renormalisation off"),
        "cfg_renorm_type": (list(RENORM_TYPES), {"default": renorm, "tooltip": "blurred edits: try global"}),
        "text_temperature": TEMPERATURE,
    }


def inputs(required: dict[str, Spec], optional: dict[str, Spec]) -> dict[str, Any]:
    return {"required": required, "optional": optional, "hidden": {"node": "UNIQUE_ID"}}
