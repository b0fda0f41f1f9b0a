"""Probes: the outputs of every linear module of a model for fixed inputs.

This is the cheapest test of a run-time module of any format. It names a module with a lost bias, a wrong scale,
saturation or a swap, where the velocity of the whole model would only be a little worse. One input row is zero, so its
output is the bias; the others are the same for all modules of one width, so that two modules can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bagel.layers import linear_dtype
from bagel.model import Bagel

PROBES = 8  # random rows per module; the zero row comes on top, first


def linear_paths(bagel: Bagel) -> dict[str, int]:
    """Attribute path -> input width of every linear module of this configuration, whatever stands there now."""
    with torch.device("meta"):
        plain = Bagel(bagel.config)
    return {path: m.in_features for path, m in plain.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def probe(bagel: Bagel) -> dict[str, Tensor]:
    """Module path -> answers [1 + PROBES, out] in the dtype the module gives; row 0 is the answer to zeros."""
    inputs: dict[int, Tensor] = {}
    answers = {}
    for path, width in linear_paths(bagel).items():
        module = bagel.get_submodule(path)
        if width not in inputs:
            rows = torch.randn((PROBES, width), generator=torch.Generator().manual_seed(width))
            inputs[width] = torch.cat([torch.zeros(1, width), rows])
        answers[path] = module(inputs[width].to(bagel.device, _dtype(module, bagel))).cpu()
    return answers


def _dtype(module: nn.Module, bagel: Bagel) -> torch.dtype:
    declared = linear_dtype(module) if hasattr(module, "compute_dtype") or hasattr(module, "weight") else bagel.dtype
    return declared if declared.is_floating_point and declared.itemsize > 1 else bagel.dtype
