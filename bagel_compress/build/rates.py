"""Rates: distributes bits per weight over the groups of weights, with the least loss at a given mean rate.

On a uniform grid coded at its entropy, the squared error of a group falls by a factor of four with every bit (Gish and
Pierce, IEEE Trans. Inf. Theory 14, 1968), so the effects that `sensitivities` measured at one rate give those at any
rate. The sum over groups of cost_g 4^-bits_g, at a fixed sum of weights_g bits_g, is least for
bits_g = level + log4(cost_g / weights_g): reverse water-filling (Cover and Thomas, Elements of Information Theory,
10.3.3), with one level for the whole model. Groups beyond the format's rates get its lowest or highest rate.
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

STEP = 0.05  # bits; rates differ from the mean rate by multiples of it, so that a recipe needs few rules
HALVINGS = 60


def water_filled(
    effects: Mapping[Group, Effect], weights: Mapping[Group, int], mean: float, ends: tuple[float, float]
) -> dict[Group, float]:
    """Bits of every group, between the ends, with a mean over all weights of at most `mean`. All effects have been
    measured at one rate."""
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
    """The largest rate at most `bits`, between the ends, that differs from the mean by a multiple of STEP."""
    return round(max(mean + math.floor((bits - mean) / STEP + 1e-9) * STEP, ends[0]), 2)


def rated_recipe(plan: Plan, effects: Mapping[Group, Effect], ends: tuple[float, float]) -> Recipe:
    """The plan's recipe with a rate for each group whose codec has rates; the mean rate of each codec is kept."""
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
