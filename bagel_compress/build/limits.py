"""Limits of parity: what each class of recipe must hold, written before any run, each with the place it comes from.

A recipe names a class and may replace single values. A limit has a sense: `max` is broken by a larger value, `min` by a
smaller one. This file knows metric names and numbers, nothing of models or reports.

Denoising is limited by what it does to the picture: `latent.path` is the error of the final latent as a share of the
way from the noise. Errors of single steps are shown in every report and can be limited by a recipe, but a lossy class
does not limit them: a trained flow corrects most of them (docs/decisions.md).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bagel_compress.errors import RecipeError

Sense = Literal["max", "min"]

# Every metric that can carry a limit: which side is bad, and what it is in words.
METRICS: dict[str, tuple[Sense, str]] = {
    "latent.path": ("max", "free run, error of the latent as a share of its way from the noise"),
    "velocity.path": ("max", "guided velocities along the reference's path, error as a share of its length"),
    "velocity.rel_l2": ("max", "velocity, worst relative L2 over single steps and branches"),
    "velocity.cosine": ("min", "velocity, worst cosine over single steps and branches"),
    "logits.kl_mean": ("max", "logits, mean KL divergence in nats"),
    "logits.kl_p999": ("max", "logits, 99.9 % quantile of the KL divergence in nats"),
    "logits.top1": ("min", "logits, share of positions with the same first choice"),
    "logits.top1_sure": ("min", "logits, share of the same first choice where the reference is at least half sure"),
    "logits.ppl_ratio": ("max", "perplexity of the reference's text over the reference's own"),
    "vae.psnr": ("min", "VAE, picture from the recorded latent, PSNR in dB"),
    "vae.rel_l2": ("max", "VAE, latents of the input pictures, relative L2"),
    "linear.gain": ("max", "linear modules, largest certain deviation of a gain from 1, by expert and layer"),
    "linear.bias": ("max", "linear modules, largest difference of a bias"),
    "image.psnr": ("min", "free run, PSNR of the picture in dB"),
    "image.ssim": ("min", "free run, SSIM of the picture"),
    "image.ms_ssim": ("min", "free run, MS-SSIM of the picture"),
    "image.lpips": ("max", "free run, LPIPS of the picture (AlexNet), with the user's weights"),
    "image.clip_drop": ("max", "free run, CLIP score lost against the reference's picture, with the user's model"),
    "image.cosine": ("min", "free run, cosine of the pixels"),
    "image.rel_l2": ("max", "free run, relative L2 of the pixels"),
    "image.mae": ("max", "free run, mean absolute difference of the pixels, of 255"),
    "text.exact": ("min", "free run, share of texts that are the same"),
    "text.prefix": ("min", "free run, common prefix of the text as a share of the reference's length"),
}
# Metrics that are gated on the median over the cases: single free runs scatter, because errors grow along a trajectory.
MEDIAN = ("image.", "text.")

_STRICT = "vLLM-Omni similarity tool, strict (PSNR 25, MAE 6, cosine 0.995, rel-L2 0.08)"
_SMOKE = "vLLM-Omni similarity tool, smoke (PSNR 20, MAE 12, cosine 0.98, rel-L2 0.20)"
_PATH = "; the same tool's relative L2 of pixels, asked of the latent's way"
_OURS = "ours"


@dataclass(frozen=True, slots=True)
class Limit:
    """A value that a metric must not pass, and where the number comes from."""

    metric: str
    value: float
    source: str

    @property
    def sense(self) -> Sense:
        return METRICS[self.metric][0]

    def holds(self, value: float) -> bool:
        return value <= self.value if self.sense == "max" else value >= self.value


_CLASSES: dict[str, tuple[Limit, ...]] = {
    "lossless": tuple(
        Limit(metric, value, "bit equality: a lossless model computes the same numbers")
        for metric, value in (
            ("latent.path", 0.0), ("velocity.rel_l2", 0.0), ("logits.kl_mean", 0.0), ("logits.top1", 1.0),
            ("vae.rel_l2", 0.0), ("linear.gain", 0.0), ("linear.bias", 0.0), ("image.mae", 0.0), ("text.exact", 1.0),
        )
    ),
    # The same weights in other arithmetic, as an export of a lossless build has them.
    "16-bit": (
        Limit("latent.path", 0.04, f"{_OURS}: half of the 8-bit limit"),
        Limit("logits.kl_mean", 0.001, f"{_OURS}: a tenth of the 8-bit limit"),
        Limit("logits.kl_p999", 0.01, f"{_OURS}: ten times the mean"),
        Limit("logits.top1_sure", 0.99, f"{_OURS}: one token in 100"),
        Limit("image.psnr", 30.0, f"{_OURS}: 3 dB above the 8-bit limit"),
        Limit("image.cosine", 0.998, f"{_OURS}: between 8-bit and equality"),
        Limit("image.rel_l2", 0.05, f"{_OURS}: between 8-bit and equality"),
        Limit("image.mae", 4.0, f"{_OURS}: between 8-bit and equality"),
        Limit("linear.gain", 0.001, f"{_OURS}: a fifth of the 8-bit limit"),
        Limit("linear.bias", 0.0, f"{_OURS}: biases are never compressed"),
        Limit("vae.psnr", 45.0, f"{_OURS}: the VAE is never compressed; one grey level is 48 dB"),
        Limit("vae.rel_l2", 0.01, f"{_OURS}: the VAE is never compressed; bf16 has 8 bits"),
    ),
    "8-bit": (
        Limit("latent.path", 0.08, _STRICT + _PATH),
        Limit("logits.kl_mean", 0.01, f"{_OURS}: a fifth of the 4-bit limit"),
        Limit("logits.kl_p999", 0.1, f"{_OURS}: ten times the mean"),
        Limit("logits.top1_sure", 0.97, f"{_OURS}: one token in 33"),
        Limit("image.psnr", 27.0, "SVDQuant paper, FLUX.1 INT8 about 27 dB"),
        Limit("image.cosine", 0.995, _STRICT),
        Limit("image.rel_l2", 0.08, _STRICT),
        Limit("image.mae", 6.0, _STRICT),
        Limit("linear.gain", 0.005, f"{_OURS}: a rounding error has no gain; half of the smallest fault of 1 %"),
        Limit("linear.bias", 0.0, f"{_OURS}: biases are never compressed"),
        Limit("vae.psnr", 45.0, f"{_OURS}: the VAE is never compressed; one grey level is 48 dB"),
        Limit("vae.rel_l2", 0.01, f"{_OURS}: the VAE is never compressed; bf16 has 8 bits"),
    ),
    "4-bit": (
        Limit("latent.path", 0.20, _SMOKE + _PATH),
        Limit("logits.kl_mean", 0.05, f"{_OURS}: about q4_K_M of an 8B model in llama.cpp"),
        Limit("logits.kl_p999", 0.5, f"{_OURS}: ten times the mean"),
        Limit("logits.top1_sure", 0.90, f"{_OURS}: one token in ten"),
        Limit("image.psnr", 20.0, _SMOKE),
        Limit("image.cosine", 0.98, _SMOKE),
        Limit("image.rel_l2", 0.20, _SMOKE),
        Limit("image.mae", 12.0, _SMOKE),
        Limit("linear.gain", 0.01, f"{_OURS}: half of a scale fault of 2 %"),
        Limit("linear.bias", 0.0, f"{_OURS}: biases are never compressed"),
        Limit("vae.psnr", 45.0, f"{_OURS}: the VAE is never compressed; one grey level is 48 dB"),
        Limit("vae.rel_l2", 0.01, f"{_OURS}: the VAE is never compressed; bf16 has 8 bits"),
    ),
}  # fmt: skip
CLASSES = tuple(_CLASSES)


def resolve(level: str, overrides: Mapping[str, float]) -> dict[str, Limit]:
    """The limits of a class with single values replaced. Raises RecipeError on a class or metric that is unknown."""
    if level not in _CLASSES:
        raise RecipeError(f"limits: class is {level!r}, expected {', '.join(CLASSES)}.")
    limits = {limit.metric: limit for limit in _CLASSES[level]}
    for metric, value in overrides.items():
        if metric not in METRICS:
            close = difflib.get_close_matches(metric, list(METRICS), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise RecipeError(f"limits: unknown metric {metric!r}{hint}; metrics are {', '.join(METRICS)}.")
        if not math.isfinite(value):
            raise RecipeError(f"limits: {metric} is {value}, expected a finite number.")
        limits[metric] = Limit(metric, value, "the recipe")
    return limits
