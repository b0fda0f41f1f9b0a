"""The sampler's arithmetic in numpy: the counterparts of bagel.flow, bagel.inputs and bagel.vit's patches. No torch.

It also reproduces torch's seeded normal numbers, so that a seed gives the same picture on every runtime.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bagel.settings import FlowSettings, TextSettings

Floats = NDArray[np.float32]


class Generator:
    """Reproduces torch's CPU generator: a Mersenne twister, whose output is used as torch uses it."""

    def __init__(self, seed: int) -> None:
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)

    def normal(self, shape: tuple[int, ...]) -> Floats:
        """The values of `torch.randn(shape)`, equal up to the last digits of logarithm and cosine. At least 16 values.

        torch's method (2.13, `normal_fill`): uniform numbers of 24 bits; in each group of 16, Box-Muller pairs the
        first 8 with the last 8; if the count is no multiple of 16, the last 16 values are drawn again.
        """
        count = int(np.prod(shape))
        if count < 16:
            raise ValueError(f"{count} normal numbers were asked for, expected at least 16.")
        values = self._uniform(count)
        full = count // 16 * 16
        values[:full] = _box_muller(values[:full])
        if count != full:
            values[-16:] = _box_muller(self._uniform(16))
        return values.reshape(shape)

    def draw(self, probabilities: Floats) -> int:
        """A random index with the given probabilities. The sequence of draws is not torch's."""
        return int(self._twister.choice(len(probabilities), p=probabilities.astype(np.float64)))

    def _uniform(self, count: int) -> Floats:
        bits = self._twister.randint(0, 1 << 32, count, dtype=np.uint32)
        return (bits & np.uint32((1 << 24) - 1)).astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: Floats) -> Floats:
    first, second = uniform.reshape(-1, 2, 8).transpose(1, 0, 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * np.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


# --- flow -------------------------------------------------------------------------------------------------------------


def schedule(num_timesteps: int, shift: float) -> Floats:
    """Times from 1 down to 0: t = s*u / (1 + (s-1)*u) for evenly spaced u.

    As in torch.linspace, each u is computed from the nearer end of the interval.
    """
    step = np.float32(-1) / np.float32(num_timesteps - 1)
    index = np.arange(num_timesteps, dtype=np.float32)
    u = np.where(index < num_timesteps // 2, 1 + step * index, -step * (num_timesteps - 1 - index)).astype(np.float32)
    s = np.float32(shift)
    return s * u / (1 + (s - 1) * u)  # type: ignore[no-any-return]


def guide(v: Floats, v_text: Floats, v_image: Floats | None, flow: FlowSettings) -> Floats:
    """bagel.flow.guide in fp32."""
    a, b, low = np.float32(flow.cfg_text_scale), np.float32(flow.cfg_img_scale), flow.cfg_renorm_min
    g = v_text + a * (v - v_text)
    if flow.cfg_renorm_type == "text_channel":
        g = g * _ratio(_norm(v), _norm(g), low)
        return g if v_image is None else v_image + b * (g - v_image)  # type: ignore[no-any-return]
    w = g if v_image is None else v_image + b * (g - v_image)
    if flow.cfg_renorm_type == "global":
        return w * _ratio(np.linalg.norm(v), np.linalg.norm(w), low)  # type: ignore[no-any-return]
    return w * _ratio(_norm(v), _norm(w), low)  # type: ignore[no-any-return]


def _norm(v: Floats) -> Floats:
    return np.linalg.norm(v, axis=-1, keepdims=True)  # type: ignore[no-any-return]


def _ratio(wanted: Floats | np.floating, found: Floats | np.floating, low: float) -> Floats:
    return np.clip(wanted / (found + np.float32(1e-8)), np.float32(low), np.float32(1))  # type: ignore[no-any-return]


def choose(logits_v: Floats, settings: TextSettings, generator: Generator | None) -> int:
    """The next token id: that of the largest logit (the lowest of equal ones), or sampled at `settings.temperature`."""
    if not settings.do_sample:
        return int(logits_v.argmax())
    scaled = logits_v.astype(np.float64) / settings.temperature
    weights = np.exp(scaled - scaled.max())
    assert generator is not None, "sampling needs a generator"
    return generator.draw((weights / weights.sum()).astype(np.float64))


# --- positions and pictures -------------------------------------------------------------------------------------------


def rope_tables(positions: NDArray[np.int64], head_dim: int, theta: float) -> tuple[Floats, Floats]:
    """Cosines and sines [1, T, E/2] of rotary positions; angles in fp32."""
    exponents = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.power(np.float32(theta), exponents)
    angles = positions.astype(np.float32)[None, :, None] * frequencies
    return np.cos(angles), np.sin(angles)


def grid_ids(rows: int, cols: int, max_per_side: int, interpolate: bool = False) -> NDArray[np.int64]:
    """Position ids of a rows x cols grid in a max_per_side² table; see bagel.inputs.grid_ids."""
    row, col = np.arange(rows), np.arange(cols)
    if interpolate:
        bounds = np.arange(1 / max_per_side, 1.0, 1 / max_per_side).astype(np.float32)
        row = np.searchsorted(bounds, np.arange(0, 1 - 1e-6, 1 / rows).astype(np.float32), side="right")
        col = np.searchsorted(bounds, np.arange(0, 1 - 1e-6, 1 / cols).astype(np.float32), side="right")
    return (row[:, None] * max_per_side + col[None, :]).reshape(-1).astype(np.int64)  # type: ignore[no-any-return]


def patchify(image_CHW: Floats, patch: int) -> Floats:
    """[C, H, W] -> [patches, patch*patch*C]: row-major patches, each flattened in (row, column, channel) order."""
    channels, height, width = image_CHW.shape
    cells = image_CHW.reshape(channels, height // patch, patch, width // patch, patch)
    return np.ascontiguousarray(cells.transpose(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels))


def unpatchify(packed: Floats, rows: int, cols: int, patch: int) -> Floats:
    """Inverse of `patchify`: [rows*cols, patch*patch*C] -> [C, rows*patch, cols*patch]."""
    cells = packed.reshape(rows, cols, patch, patch, -1)
    return np.ascontiguousarray(cells.transpose(4, 0, 2, 1, 3).reshape(-1, rows * patch, cols * patch))


def to_pixels(image: Image.Image) -> Floats:
    """RGB image -> [3, H, W] in [-1, 1]."""
    values = np.asarray(image, dtype=np.uint8).transpose(2, 0, 1).astype(np.float32)
    return np.ascontiguousarray((values / np.float32(255) - np.float32(0.5)) / np.float32(0.5))


def to_picture(image_CHW: Floats) -> Image.Image:
    """Nominal [-1, 1] -> picture: clamped, times 255, truncated (not rounded), as upstream does."""
    scaled = np.clip(image_CHW * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    return Image.fromarray(scaled.astype(np.uint8).transpose(1, 2, 0))
