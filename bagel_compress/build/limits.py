"""The metrics, and the limits of each class of recipes with their origin. They were set before any run.

A recipe names a class and may replace single values. A limit of sense `max` is broken by a larger value, one of sense
`min` by a smaller one. `Metric` declares every metric once: name, unit, sense and description.

Denoising is limited by its effect on the picture: `latent.path` is the error of the final latent relative to the
latent's distance from the noise. Errors of single steps are shown in every report and can be limited by a recipe, but
the lossy classes do not limit them, since a trained flow corrects most of them (docs/decisions.md).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from bagel_compress.errors import RecipeError

Sense = Literal["max", "min"]


class Metric(StrEnum):
    """A distance from the reference. The value is its name in recipes, traces and reports.

    `sense` is "max" if limits are upper bounds (errors), "min" if they are lower bounds (similarities), None if the
    metric is only shown.
    """

    # fmt: off
    LATENT_PATH = "latent.path", "", "max", "free run, error of the latent as a share of its way from the noise"
    VELOCITY_PATH = "velocity.path", "", "max", (
        "guided velocities along the reference's path, error as a share of its length"
    )
    VELOCITY_REL_L2 = "velocity.rel_l2", "", "max", "velocity, worst relative L2 over single steps and branches"
    VELOCITY_COSINE = "velocity.cosine", "", "min", "velocity, worst cosine over single steps and branches"
    LOGITS_KL_MEAN = "logits.kl_mean", "nats", "max", "logits, mean KL divergence"
    LOGITS_KL_P999 = "logits.kl_p999", "nats", "max", "logits, 99.9 % quantile of the KL divergence"
    LOGITS_TOP1 = "logits.top1", "", "min", "logits, share of positions with the same first choice"
    LOGITS_TOP1_SURE = "logits.top1_sure", "", "min", (
        "logits, share of the same first choice where the reference is at least half sure"
    )
    LOGITS_PPL_RATIO = "logits.ppl_ratio", "", "max", "perplexity of the reference's text over the reference's own"
    LOGITS_REL_L2 = "logits.rel_l2", "", None, "logits, relative L2"
    VAE_PSNR = "vae.psnr", "dB", "min", "VAE, picture from the recorded latent, PSNR"
    VAE_REL_L2 = "vae.rel_l2", "", "max", "VAE, latents of the input pictures, relative L2"
    LINEAR_GAIN = "linear.gain", "", "max", (
        "linear modules, largest certain deviation of a gain from 1, by expert and layer"
    )
    LINEAR_BIAS = "linear.bias", "", "max", "linear modules, largest difference of a bias"
    IMAGE_PSNR = "image.psnr", "dB", "min", "free run, PSNR of the picture"
    IMAGE_SSIM = "image.ssim", "", "min", "free run, SSIM of the picture"
    IMAGE_MS_SSIM = "image.ms_ssim", "", "min", "free run, MS-SSIM of the picture"
    IMAGE_LPIPS = "image.lpips", "", "max", "free run, LPIPS of the picture (AlexNet), with the user's weights"
    IMAGE_CLIP = "image.clip", "", None, "free run, CLIP score of the picture, with the user's model"
    IMAGE_CLIP_DROP = "image.clip_drop", "", "max", (
        "free run, CLIP score lost against the reference's picture, with the user's model"
    )
    IMAGE_COSINE = "image.cosine", "", "min", "free run, cosine of the pixels"
    IMAGE_REL_L2 = "image.rel_l2", "", "max", "free run, relative L2 of the pixels"
    IMAGE_MAE = "image.mae", "of 255", "max", "free run, mean absolute difference of the pixels"
    TEXT_EXACT = "text.exact", "", "min", "free run, share of texts that are the same"
    TEXT_PREFIX = "text.prefix", "", "min", (
        "free run, common prefix of the text as a share of the reference's length"
    )
    # fmt: on

    unit: str
    sense: Sense | None
    description: str  # without the unit

    def __new__(cls, name: str, unit: str, sense: Sense | None, description: str) -> Metric:
        metric = str.__new__(cls, name)
        metric._value_, metric.unit, metric.sense, metric.description = name, unit, sense, description
        return metric

    @property
    def label(self) -> str:
        """The description with the unit."""
        if not self.unit:
            return self.description
        return (
            f"{self.description}, {self.unit}" if self.unit.startswith("of ") else f"{self.description} in {self.unit}"
        )

    @property
    def over_cases_by_median(self) -> bool:
        """Whether the limit applies to the median over the cases: for free runs, whose single values vary strongly."""
        return self.value.startswith(("image.", "text."))


METRICS: dict[str, Metric] = {metric.value: metric for metric in Metric if metric.sense}  # those with a limit

_STRICT = "vLLM-Omni similarity tool, strict (PSNR 25, MAE 6, cosine 0.995, rel-L2 0.08)"
_SMOKE = "vLLM-Omni similarity tool, smoke (PSNR 20, MAE 12, cosine 0.98, rel-L2 0.20)"
_PATH = "; the same tool's relative L2 of pixels, asked of the latent's way"
_OURS = "ours"


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound on a metric, and the origin of the number."""

    metric: Metric
    value: float
    source: str

    @property
    def sense(self) -> Sense:
        """`max` if larger values break the limit, `min` if smaller ones do."""
        assert self.metric.sense is not None
        return self.metric.sense

    def holds(self, value: float) -> bool:
        return value <= self.value if self.sense == "max" else value >= self.value


_CLASSES: dict[str, tuple[Limit, ...]] = {
    "lossless": tuple(
        Limit(metric, value, "bit equality: a lossless model computes the same numbers")
        for metric, value in (
            (Metric.LATENT_PATH, 0.0), (Metric.VELOCITY_REL_L2, 0.0), (Metric.LOGITS_KL_MEAN, 0.0),
            (Metric.LOGITS_TOP1, 1.0), (Metric.VAE_REL_L2, 0.0), (Metric.LINEAR_GAIN, 0.0), (Metric.LINEAR_BIAS, 0.0),
            (Metric.IMAGE_MAE, 0.0), (Metric.TEXT_EXACT, 1.0),
        )
    ),
    # For unchanged weights in other arithmetic, such as exports of a lossless build.
    "16-bit": (
        Limit(Metric.LATENT_PATH, 0.04, f"{_OURS}: half of the 8-bit limit"),
        Limit(Metric.LOGITS_KL_MEAN, 0.001, f"{_OURS}: a tenth of the 8-bit limit"),
        Limit(Metric.LOGITS_KL_P999, 0.01, f"{_OURS}: ten times the mean"),
        Limit(Metric.LOGITS_TOP1_SURE, 0.99, f"{_OURS}: one token in 100"),
        Limit(Metric.IMAGE_PSNR, 30.0, f"{_OURS}: 3 dB above the 8-bit limit"),
        Limit(Metric.IMAGE_COSINE, 0.998, f"{_OURS}: between 8-bit and equality"),
        Limit(Metric.IMAGE_REL_L2, 0.05, f"{_OURS}: between 8-bit and equality"),
        Limit(Metric.IMAGE_MAE, 4.0, f"{_OURS}: between 8-bit and equality"),
        Limit(Metric.LINEAR_GAIN, 0.001, f"{_OURS}: a fifth of the 8-bit limit"),
        Limit(Metric.LINEAR_BIAS, 0.0, f"{_OURS}: biases are never compressed"),
        Limit(Metric.VAE_PSNR, 45.0, f"{_OURS}: the VAE is never compressed; one grey level is 48 dB"),
        Limit(Metric.VAE_REL_L2, 0.01, f"{_OURS}: the VAE is never compressed; bf16 has 8 bits"),
    ),
    "8-bit": (
        Limit(Metric.LATENT_PATH, 0.08, _STRICT + _PATH),
        Limit(Metric.LOGITS_KL_MEAN, 0.01, f"{_OURS}: a fifth of the 4-bit limit"),
        Limit(Metric.LOGITS_KL_P999, 0.1, f"{_OURS}: ten times the mean"),
        Limit(Metric.LOGITS_TOP1_SURE, 0.97, f"{_OURS}: one token in 33"),
        Limit(Metric.IMAGE_PSNR, 27.0, "SVDQuant paper, FLUX.1 INT8 about 27 dB"),
        Limit(Metric.IMAGE_COSINE, 0.995, _STRICT),
        Limit(Metric.IMAGE_REL_L2, 0.08, _STRICT),
        Limit(Metric.IMAGE_MAE, 6.0, _STRICT),
        Limit(Metric.LINEAR_GAIN, 0.005, f"{_OURS}: a rounding error has no gain; half of the smallest fault of 1 %"),
        Limit(Metric.LINEAR_BIAS, 0.0, f"{_OURS}: biases are never compressed"),
        Limit(Metric.VAE_PSNR, 45.0, f"{_OURS}: the VAE is never compressed; one grey level is 48 dB"),
        Limit(Metric.VAE_REL_L2, 0.01, f"{_OURS}: the VAE is never compressed; bf16 has 8 bits"),
    ),
    "4-bit": (
        Limit(Metric.LATENT_PATH, 0.20, _SMOKE + _PATH),
        Limit(Metric.LOGITS_KL_MEAN, 0.05, f"{_OURS}: about q4_K_M of an 8B model in llama.cpp"),
        Limit(Metric.LOGITS_KL_P999, 0.5, f"{_OURS}: ten times the mean"),
        Limit(Metric.LOGITS_TOP1_SURE, 0.90, f"{_OURS}: one token in ten"),
        Limit(Metric.IMAGE_PSNR, 20.0, _SMOKE),
        Limit(Metric.IMAGE_COSINE, 0.98, _SMOKE),
        Limit(Metric.IMAGE_REL_L2, 0.20, _SMOKE),
        Limit(Metric.IMAGE_MAE, 12.0, _SMOKE),
        Limit(Metric.LINEAR_GAIN, 0.01, f"{_OURS}: half of a scale fault of 2 %"),
        Limit(Metric.LINEAR_BIAS, 0.0, f"{_OURS}: biases are never compressed"),
        Limit(Metric.VAE_PSNR, 45.0, f"{_OURS}: the VAE is never compressed; one grey level is 48 dB"),
        Limit(Metric.VAE_REL_L2, 0.01, f"{_OURS}: the VAE is never compressed; bf16 has 8 bits"),
    ),
}  # fmt: skip
CLASSES = tuple(_CLASSES)


def resolve(level: str, overrides: Mapping[str, float]) -> dict[str, Limit]:
    """Metric -> limit of a class, with single values replaced by `overrides`.

    Raises RecipeError on a class or metric that is unknown.
    """
    if level not in _CLASSES:
        raise RecipeError(f"limits: class is {level!r}, expected {', '.join(CLASSES)}.")
    limits: dict[str, Limit] = {limit.metric: limit for limit in _CLASSES[level]}
    for metric, value in overrides.items():
        if metric not in METRICS:
            raise RecipeError(f"limits: {unknown_metric(metric)}.")
        if not math.isfinite(value):
            raise RecipeError(f"limits: {metric} is {value}, expected a finite number.")
        limits[metric] = Limit(METRICS[metric], value, "the recipe")
    return limits


def unknown_metric(name: str) -> str:
    """The error message for a name that is no metric with a limit."""
    close = difflib.get_close_matches(name, list(METRICS), n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown metric {name!r}{hint}; metrics are {', '.join(METRICS)}"
