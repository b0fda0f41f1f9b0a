"""LPIPS (Zhang et al. 2018), the AlexNet variant, with weights that the user supplies; nothing is downloaded.

One safetensors file with torchvision's names for AlexNet's convolutions and the lpips package's for its linear heads:

    features.0.weight [64, 3, 11, 11]   .bias      lin0.model.1.weight [1, 64, 1, 1]
    features.3.weight [192, 64, 5, 5]   .bias      lin1.model.1.weight [1, 192, 1, 1]
    features.6.weight [384, 192, 3, 3]  .bias      lin2.model.1.weight [1, 384, 1, 1]
    features.8.weight [256, 384, 3, 3]  .bias      lin3.model.1.weight [1, 256, 1, 1]
    features.10.weight [256, 256, 3, 3] .bias      lin4.model.1.weight [1, 256, 1, 1]

Other tensors in the file are ignored. The value depends on these weights, so no limit class includes it; a recipe may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bagel_compress.errors import TraceError

# Stage: layer in torchvision's AlexNet, shape of its weight, stride, padding, whether 3x3 max pooling comes before it.
STAGES = (
    (0, (64, 3, 11, 11), 4, 2, False),
    (3, (192, 64, 5, 5), 1, 2, True),
    (6, (384, 192, 3, 3), 1, 1, True),
    (8, (256, 384, 3, 3), 1, 1, False),
    (10, (256, 256, 3, 3), 1, 1, False),
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in -1..1; the lpips package's ScalingLayer
EPSILON = 1e-10
SMALLEST = 31  # smallest side of a picture in pixels, such that the second pooling has an input


@dataclass(frozen=True, slots=True)
class Lpips:
    """Loaded LPIPS weights. Calling it gives the distance of two pictures; 0 for equal ones."""

    weights: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: str | Path) -> Lpips:
        """Loads the weights. Raises TraceError if the file cannot be read or lacks a tensor of these shapes."""
        try:
            tensors = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise TraceError(f"LPIPS weights {path} cannot be read ({error}); give a safetensors file.") from None
        for name, shape in _expected().items():
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != shape:
                raise TraceError(
                    f"LPIPS weights {path}: {name} is {list(found) if found else 'missing'}, expected {list(shape)};"
                    " give AlexNet's convolutions and the lpips package's heads in one file."
                )
        return cls({name: tensors[name].float() for name in _expected()})

    @torch.no_grad()
    def __call__(self, found_HWC: Tensor, reference_HWC: Tensor) -> float:
        """Distance of two pictures, uint8 [H, W, 3], with sides of at least SMALLEST pixels."""
        total = 0.0
        pairs = zip(self._features(found_HWC), self._features(reference_HWC), strict=True)
        for stage, (a, b) in enumerate(pairs):
            difference = (_unit(a) - _unit(b)).square()
            total += F.conv2d(difference, self.weights[_head(stage)]).mean().item()
        return total

    def _features(self, picture_HWC: Tensor) -> list[Tensor]:
        x = picture_HWC.permute(2, 0, 1)[None].float() / 127.5 - 1
        x = (x - torch.tensor(SHIFT).view(1, 3, 1, 1)) / torch.tensor(SCALE).view(1, 3, 1, 1)
        states = []
        for layer, _, stride, padding, pooled in STAGES:
            x = F.max_pool2d(x, 3, 2) if pooled else x
            weight, bias = self.weights[f"features.{layer}.weight"], self.weights[f"features.{layer}.bias"]
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            states.append(x)
        return states


def _unit(x_1CHW: Tensor) -> Tensor:
    return x_1CHW / (x_1CHW.square().sum(1, keepdim=True).sqrt() + EPSILON)


def _head(stage: int) -> str:
    return f"lin{stage}.model.1.weight"


def _expected() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for stage, (layer, shape, *_) in enumerate(STAGES):
        shapes |= {f"features.{layer}.weight": shape, f"features.{layer}.bias": shape[:1]}
        shapes[_head(stage)] = (1, shape[0], 1, 1)
    return shapes
