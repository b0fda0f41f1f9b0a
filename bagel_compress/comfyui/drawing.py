"""Running a sampler for a node: settings, seeds, sizes, and ComfyUI's IMAGE."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from bagel.loops import Loops, Result, Turn
from bagel.settings import FlowSettings, TextSettings
from bagel_compress.comfyui.model import BagelModel
from bagel_compress.comfyui.sockets import NO_PRESET, SPEED
from bagel_compress.comfyui.watch import Watch, giving_back
from bagel_compress.errors import InputError
from bagel_compress.run.presets import with_preset

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("bagel_compress")

RATIOS = {"1:1": (1024, 1024), "4:3": (768, 1024), "3:4": (1024, 768), "16:9": (576, 1024), "9:16": (1024, 576)}  # H, W
OFFICIAL_SIDE = 1024
THINK_TOKENS = 1024


def run(
    model: Any,
    turns: Sequence[Turn],
    settings: Mapping[str, Any],
    seed: int,
    node: str | None,
    ratio: str | None = None,
) -> Result:
    """A picture by a node's settings, from what its model socket carries. Seed 0 draws one, which the log tells.

    `ratio`: one of RATIOS; None: the size of the input picture. Raises InputError, BagelError.
    """
    sampler = opened(model)
    size = None if ratio is None else size_of(sampler, ratio)
    flow = FlowSettings(
        num_timesteps=settings["num_timesteps"],
        timestep_shift=settings.get("timestep_shift", 3.0),
        cfg_text_scale=settings["cfg_text_scale"],
        cfg_img_scale=settings.get("cfg_img_scale", 1.0),
        cfg_interval=(settings.get("cfg_interval", 0.4), 1.0),
        cfg_renorm_min=settings.get("cfg_renorm_min", 0.0),
        cfg_renorm_type=settings.get("cfg_renorm_type", "global"),
        **{name: settings[name] for name in SPEED if name in settings},
    )
    preset = settings.get("preset", NO_PRESET)
    if preset != NO_PRESET:
        flow = with_preset(flow, preset, model.weights.folder)
    text = TextSettings(THINK_TOKENS, temperature=settings.get("text_temperature", 0.3))
    think = settings.get("show_thinking", False)
    with giving_back():
        return sampler.run(
            turns, think=think, size=size, flow=flow, text=text, seed=chosen(seed), listener=Watch(sampler, node)
        )


def chosen(seed: int) -> int:
    """The seed, or for 0 a new one within the official page's range."""
    if seed == 0:
        seed = random.SystemRandom().randint(1, 1_000_000)
        log.info("seed %d", seed)
    return seed


def opened(model: Any) -> Loops:
    """The sampler of a socket's model. Raises InputError if another package's loader made it."""
    if not isinstance(model, BagelModel):
        raise InputError(
            f"the model is a {type(model).__name__} of another node package; connect a BAGEL model loader of"
            " bagel-compress."
        )
    return model.sampler()


def size_of(sampler: Any, ratio: str) -> tuple[int, int]:
    """(H, W) of a ratio: the official sizes, or the same ratio at the size that a smaller model was trained with."""
    rule, stride = sampler.bagel.config.vae_rule, sampler.bagel.config.image_stride
    height, width = (max(1, side * rule.max_size // OFFICIAL_SIDE // stride) * stride for side in RATIOS[ratio])
    return height, width


def images(batch_BHWC: Tensor) -> list[Image.Image]:
    """The pictures of an IMAGE."""
    rows = (batch_BHWC.clamp(0, 1) * 255).round().byte().cpu().numpy()
    return [Image.fromarray(row[..., :3]) for row in rows]


def pictures(results: Sequence[Result]) -> Tensor:
    """The IMAGE of results, [B, H, W, 3]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([np.asarray(result.image) for result in results])).float() / 255
