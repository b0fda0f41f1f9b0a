"""Converts pictures to tensors and position ids. Text and resize rules need no torch: see `text` and `images`."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel.images import resized, resized_sides, to_rgb
from bagel.text import BOS, EOS, IMAGE_END, IMAGE_START, QWEN2_SPLIT, THINK_IMAGE, THINK_TEXT, TextCodec

__all__ = [
    "BOS", "EOS", "IMAGE_END", "IMAGE_START", "QWEN2_SPLIT", "THINK_IMAGE", "THINK_TEXT", "TextCodec",
    "grid_ids", "resized", "resized_sides", "to_rgb", "to_tensor",
]  # fmt: skip


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> [3, H, W] fp32 in [-1, 1]."""
    pixels_HWC = torch.from_numpy(np.array(image, dtype=np.uint8))
    return (pixels_HWC.permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def grid_ids(rows: int, cols: int, max_per_side: int, interpolate: bool = False) -> Tensor:
    """Position ids of a rows x cols grid in a max_per_side² table, row-major.

    Plain: row * max + col from the table's top-left corner. Interpolated: each coordinate i/n falls into one of `max`
    equal buckets, closed on the right.
    """
    if interpolate:
        bounds = torch.arange(1 / max_per_side, 1.0, 1 / max_per_side)
        row = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / rows), bounds, right=True)
        col = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / cols), bounds, right=True)
    else:
        row, col = torch.arange(rows), torch.arange(cols)
    return (row[:, None] * max_per_side + col[None, :]).flatten()
