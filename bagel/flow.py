"""Rectified flow: the time schedule, classifier-free guidance with renormalisation, and the Euler step.

x at t = 1 is noise, at t = 0 data; the network predicts v = noise - data. Three branches are guided: cond, text dropped
and image dropped. Pure functions on packed latents [N, p*p*z]; no model here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagel.settings import RENORM_TYPES, FlowSettings

__all__ = ["RENORM_TYPES", "FlowSettings", "euler", "guide", "schedule"]


def schedule(num_timesteps: int, shift: float) -> Tensor:
    """Times from 1 down to 0, fp32: t = s*u / (1 + (s-1)*u) of evenly spaced u."""
    u = torch.linspace(1, 0, num_timesteps)
    return shift * u / (1 + (shift - 1) * u)


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
