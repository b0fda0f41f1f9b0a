"""Rates: bits per weight for each group of weights, so that at one mean rate a build loses least.

On a uniform grid coded at its entropy the squared error of a group falls by four with every bit (Gish and Pierce, IEEE
Trans. Inf. Theory 14, 1968), so what `sensitivities` measured at one rate says what a group costs at any.
The sum over groups of cost_g 4^-bits_g at a fixed sum of weights_g bits_g is least where every group loses as much per
bit, bits_g = level + log4(cost_g / weights_g): reverse water-filling (Cover and Thomas, Elements of Information Theory,
10.3.3), one level for the whole model, and the ends of the format's rates for groups beyond them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from bagel_compress.build.allocate import group_of, group_rule, rules_of_the_rest, shares_of_cost
from bagel_compress.build.plan import Plan
from bagel_compress.build.recipe import Recipe, Rule
from bagel_compress.build.sensitivity import Effect, Group
from bagel_compress.codecs.base import Codec

STEP = 0.05  # bits: rates of groups are multiples of it above the mean's, so that rules of a recipe stay few
HALVINGS = 60


def water_filled(
    effects: Mapping[Group, Effect], weights: Mapping[Group, int], mean: float, ends: tuple[float, float]
) -> dict[Group, float]:
    """Bits of every group, within the ends, whose mean over all weights is `mean` at most. Effects are of one rate."""
    costs = {group: cost for group, (cost,) in shares_of_cost({g: (e,) for g, e in effects.items()}).items()}
    wanted = {g: math.log(max(costs[g], 1e-30) / weights[g], 4) for g in effects}
    low, high = ends[0] - max(wanted.values()), ends[1] - min(wanted.values())

    def at(level: float) -> dict[Group, float]:
        return {g: _stepped(min(max(level + wanted[g], ends[0]), ends[1]), mean, ends) for g in effects}

    total = sum(weights.values())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        spent = sum(weights[g] * bits for g, bits in at(middle).items())
        low, high = (middle, high) if spent <= mean * total + 1e-6 * total else (low, middle)
    return at(low)


def _stepped(bits: float, mean: float, ends: tuple[float, float]) -> float:
    """The rate of the mean and a multiple of STEP, below or at `bits`, and within the ends."""
    return round(max(mean + math.floor((bits - mean) / STEP + 1e-9) * STEP, ends[0]), 2)


def rated_recipe(plan: Plan, effects: Mapping[Group, Effect], ends: tuple[float, float]) -> Recipe:
    """The plan's recipe with rates of their own for the groups whose codec has one; the mean of each codec is kept."""
    by_codec: dict[Codec, dict[Group, int]] = defaultdict(lambda: defaultdict(int))
    for placement in plan.placements:
        group = group_of(placement.unit.specs[0].name)
        if group is not None and group in effects and hasattr(placement.codec, "bits"):
            by_codec[placement.codec][group] += placement.unit.numel
    rules: list[Rule] = []
    for codec, weights in by_codec.items():
        rates = water_filled({g: effects[g] for g in weights}, weights, codec.bits, ends)  # type: ignore[attr-defined]
        alike: dict[tuple[str, str, float], list[int]] = defaultdict(list)
        for group in sorted(weights):
            alike[group.expert, group.name, rates[group]].append(group.layer)
        rules += [
            group_rule(codec.model_copy(update={"bits": bits}), expert, name, layers)
            for (expert, name, bits), layers in alike.items()
        ]
    rest = rules_of_the_rest(plan, {group for weights in by_codec.values() for group in weights})
    return plan.recipe.model_copy(update={"rules": (*rules, *rest)})
