"""Probes: what every linear module of a model answers, to fixed inputs and to some of its own.

This is the cheapest test of a run-time module of any format. It names a module with a lost bias, a wrong scale,
saturation or a swap, where the velocity of the whole model would only be a little worse. One fixed input row is zero,
so its output is the bias; the others are the same for all modules of one width, so that two modules can be compared.

Whether a module's scale is right is asked with inputs that it really gets, taken from the reference's run of some
cases: calibrated rounding keeps the answers to those, and changes the answers to inputs that never come.
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

PROBES = 8  # fixed rows per module, and rows of its own; the zero row comes on top, first
OF_A_CALL, OF_A_CASE = 2, 4  # rows of its own that one call of a module and one case give at most


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


@torch.no_grad()
def own_inputs(sampler: Sampler, traces: Sequence[Trace]) -> dict[str, Tensor]:
    """Module path -> inputs [up to PROBES, in] that it gets when the cases are replayed; without those that get none.

    Cases are replayed in order until every module has its rows.
    """
    rows: dict[str, list[Tensor]] = {path: [] for path in linear_paths(sampler.bagel)}
    for trace in traces:
        if all(len(found) >= PROBES for found in rows.values()):
            break
        limits = {path: min(PROBES, len(found) + OF_A_CASE) for path, found in rows.items()}
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
    """Module path -> the answers [1 + rows, out] to zeros, as `probe` found them, and to the module's own inputs."""
    found = {}
    for path, rows in inputs.items():
        module = bagel.get_submodule(path)
        answers = module(rows.to(bagel.device, _dtype(module, bagel))).cpu()
        found[path] = torch.cat([fixed[path][:1], answers])
    return found


def _keeping(rows: list[Tensor], limit: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds rows of a module's input, evenly spaced ones of each call, until there are `limit`."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given = inputs[0].reshape(-1, inputs[0].shape[-1])
        count = min(OF_A_CALL, limit - len(rows), len(given))
        if count > 0:
            rows.extend(given[(2 * i + 1) * len(given) // (2 * count)].cpu().clone() for i in range(count))

    return keep


def _dtype(module: nn.Module, bagel: Bagel) -> torch.dtype:
    declared = linear_dtype(module) if hasattr(module, "compute_dtype") or hasattr(module, "weight") else bagel.dtype
    return declared if declared.is_floating_point and declared.itemsize > 1 else bagel.dtype
