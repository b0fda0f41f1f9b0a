"""Rectified flow: the time schedule, classifier-free guidance with renormalisation, and the Euler step.

x at t = 1 is noise, at t = 0 data; the network predicts v = noise - data. Three branches are guided: cond, text dropped
and image dropped. Pure functions on packed latents [N, p*p*z]; no model here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def schedule(num_timesteps: int, shift: float) -> Tensor:
    """Times from 1 down to 0, fp32: t = s*u / (1 + (s-1)*u) of evenly spaced u."""
    u = torch.linspace(1, 0, num_timesteps)
    return shift * u / (1 + (shift - 1) * u)


def guided(t: Tensor, flow: FlowSettings) -> bool:
    """Whether guidance acts at time t: lower bound strict, upper inclusive."""
    low, high = flow.cfg_interval
    return bool(t > low) and bool(t <= high)


def guide(v: Tensor, v_text: Tensor, v_image: Tensor | None, flow: FlowSettings) -> Tensor:
    """The guided velocity from the conditional, text-dropped and image-dropped ones (None: image guidance off).

    Combined in the dtype of v, norms in fp32. A scalar scale keeps that dtype, a per-token one makes the result fp32.
    """
    a, b, low = flow.cfg_text_scale, flow.cfg_img_scale, flow.cfg_renorm_min
    g = v_text + a * (v - v_text)
    if flow.cfg_renorm_type == "text_channel":
        g = g * _ratio(_norm(v), _norm(g), low)
        return g if v_image is None else v_image + b * (g - v_image)
    w = g if v_image is None else v_image + b * (g - v_image)
    if flow.cfg_renorm_type == "global":
        return w * _ratio(v.float().norm(), w.float().norm(), low)
    return w * _ratio(_norm(v), _norm(w), low)


def _norm(v: Tensor) -> Tensor:
    return v.float().norm(dim=-1, keepdim=True)


def _ratio(wanted: Tensor, found: Tensor, low: float) -> Tensor:
    return (wanted / (found + 1e-8)).clamp(min=low, max=1.0)


def euler(x: Tensor, v: Tensor, dt: Tensor) -> Tensor:
    """x - v*dt with v*dt in the dtype of v, x in fp32."""
    return x - v * dt
