"""Probes: the outputs of every linear module of a model for fixed inputs and for some recorded inputs of its own.

This is the cheapest test of a run-time module of any format. It finds a module with a lost bias, a wrong scale,
saturation or swapped weights, which would change the velocity of the whole model only a little. One fixed input row is
zero, so its output is the bias; the other rows are the same for all modules of one input width, so that two modules can
be compared.

Scales are tested with inputs that the module really gets, recorded while the reference runs some cases. Calibrated
rounding keeps the outputs for such inputs, but may change those for random ones, which never occur.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bagel.layers import linear_dtype
from bagel.model import Bagel
from bagel.sampler import Sampler
from bagel_compress.parity import replay
from bagel_compress.parity.trace import Trace

PROBES = 8  # rows of fixed inputs per module, without the zero row, which comes first; and rows of its own inputs
ROWS_PER_CALL, ROWS_PER_CASE = 2, 4  # own inputs recorded from one call of a module and from one case, at most


def linear_paths(bagel: Bagel) -> dict[str, int]:
    """Attribute path -> input width, of every module that is an nn.Linear in the uncompressed model."""
    with torch.device("meta"):
        plain = Bagel(bagel.config)
    return {path: m.in_features for path, m in plain.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def probe(bagel: Bagel) -> dict[str, Tensor]:
    """Module path -> outputs [1 + PROBES, out] for the fixed inputs, in the module's dtype; row 0 is for zeros."""
    inputs: dict[int, Tensor] = {}
    answers = {}
    for path, width in linear_paths(bagel).items():
        module = bagel.get_submodule(path)
        if width not in inputs:
            rows = torch.randn((PROBES, width), generator=torch.Generator().manual_seed(width))
            inputs[width] = torch.cat([torch.zeros(1, width), rows])
        answers[path] = module(inputs[width].to(bagel.device, _dtype(module, bagel))).cpu()
    return answers


@torch.no_grad()
def own_inputs(sampler: Sampler, traces: Sequence[Trace]) -> dict[str, Tensor]:
    """Module path -> recorded inputs [up to PROBES, in] of the module; modules that get none are left out.

    The cases are replayed in order until every module has PROBES rows.
    """
    rows: dict[str, list[Tensor]] = {path: [] for path in linear_paths(sampler.bagel)}
    for trace in traces:
        if all(len(found) >= PROBES for found in rows.values()):
            break
        limits = {path: min(PROBES, len(found) + ROWS_PER_CASE) for path, found in rows.items()}
        hooks = [
            sampler.bagel.get_submodule(path).register_forward_pre_hook(_keeping(rows[path], limits[path]))
            for path in rows
        ]
        try:
            replay.replay(sampler, trace)
        finally:
            for hook in hooks:
                hook.remove()
    return {path: torch.stack(found) for path, found in rows.items() if found}


@torch.no_grad()
def answers_to(bagel: Bagel, inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module path -> outputs [1 + rows, out] for the module's own inputs; row 0, for zeros, is taken from `fixed`."""
    found = {}
    for path, rows in inputs.items():
        module = bagel.get_submodule(path)
        answers = module(rows.to(bagel.device, _dtype(module, bagel))).cpu()
        found[path] = torch.cat([fixed[path][:1], answers])
    return found


def _keeping(rows: list[Tensor], limit: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that appends evenly spaced rows of each call's input to `rows`, until there are `limit`."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given = inputs[0].reshape(-1, inputs[0].shape[-1])
        count = min(ROWS_PER_CALL, limit - len(rows), len(given))
        if count > 0:
            rows.extend(given[(2 * i + 1) * len(given) // (2 * count)].cpu().clone() for i in range(count))

    return keep


def _dtype(module: nn.Module, bagel: Bagel) -> torch.dtype:
    declared = linear_dtype(module) if hasattr(module, "compute_dtype") or hasattr(module, "weight") else bagel.dtype
    return declared if declared.is_floating_point and declared.itemsize > 1 else bagel.dtype
