"""Golden: an opened golden folder, a checkpoint with traces that the official code recorded from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from bagel.config import ResizeRule
from bagel.layers import attention_kernel
from bagel.sampler import Sampler

Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Golden:
    """An opened golden folder."""

    folder: Path
    manifest: dict[str, Any]
    sampler: Sampler
    mode: str  # "fp32" or "bf16"

    @classmethod
    def open(cls, folder: Path, manifest: dict[str, Any], mode: str) -> Golden:
        """Loads the checkpoint; sizes that the official code keeps in code come from the manifest."""
        about = manifest["checkpoint"]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[mode]
        sampler = Sampler.from_dir(folder / about["dir"], dtype=dtype)
        sampler.bagel.config = dataclasses.replace(
            sampler.bagel.config,
            vae_rule=_rule(about["vae_transform"], about["max_pixels"]),
            vit_rule=_rule(about["vit_transform"], about["max_pixels"]),
        )
        vae = about["vae_params"]
        sampler.vae.config = dataclasses.replace(
            sampler.vae.config, scale_factor=vae["scale_factor"], shift_factor=vae["shift_factor"]
        )
        return cls(folder, manifest, sampler, mode)

    def image(self, name: str) -> Image.Image:
        return Image.open(self.folder / self.manifest["images"][name]["file"])

    def recorded(self, scenario: str) -> Tensors:
        return load_file(self.folder / self.manifest["scenarios"][scenario]["runs"][self.mode]["file"])

    def as_recorded(self) -> AbstractContextManager[None]:
        """The recording's attention: exact in bf16, where kernels differ by more than the rounding of a layer."""
        return attention_kernel("exact" if self.mode == "bf16" else "fast")


def _rule(raw: Mapping[str, int], max_pixels: int) -> ResizeRule:
    return ResizeRule(raw["max_image_size"], raw["min_image_size"], raw["image_stride"], max_pixels)


def levels(image: Image.Image) -> Tensor:
    """Picture -> uint8 [H, W, 3]."""
    return torch.from_numpy(np.array(image))
