"""Allocation: the knapsack, its errors, and the recipe that it writes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from bagel_compress.build.allocate import allocate, allocated_recipe, movable_codecs
from bagel_compress.build.plan import Plan, make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.build.recipe_text import recipe_text
from bagel_compress.build.sensitivity import GROUPS, Effect, Group
from bagel_compress.codecs.base import Unit
from bagel_compress.errors import PlanError
from bagel_compress.source.checkpoint import Checkpoint

TINY = Path(__file__).parents[1] / "data/golden/checkpoint"
RECIPE = """
name: base
rules:
  - {match: {component: llm, kind: linear}, codec: {format: nf4, double_quant: true}}
  - {match: {component: [llm, vit], kind: [linear, head]}, codec: int8}
  - {match: {}, codec: raw}
"""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(Checkpoint.open(TINY), Recipe.parse(RECIPE, "base"))


def effects_of(plan: Plan) -> dict[Group, tuple[Effect, ...]]:
    """Made-up effects with the true sizes: NF4 costs a random amount, INT8 a hundredth of it."""
    rng, found = np.random.default_rng(0), {}
    by_path = {p.unit.specs[0].name: p for p in plan.placements}
    from bagel.loading import parameter_path

    specs = {parameter_path(name): p.unit.specs[0] for name, p in by_path.items()}
    layers = {int(path.split(".")[1]) for path in specs if path.startswith("layers.")}
    for layer, expert, name in itertools.product(sorted(layers), ("und", "gen"), GROUPS):
        group = Group(layer, expert, name)
        units = [Unit(specs[path].name, (specs[path],)) for path in group.paths]
        velocity, kl = rng.lognormal(-8, 2), rng.lognormal(-10, 2)
        found[group] = tuple(
            Effect(velocity * share, kl * share, sum(codec.nbytes(unit) for unit in units))
            for codec, share in zip(movable_codecs(plan), (1.0, 0.01), strict=True)
        )
    return found


def test_all_choices_that_fit_cost_at_least_as_much(plan: Plan) -> None:
    """Against every choice for eight groups; the multiplier's choice is within the cost of one group of the best."""
    codecs = movable_codecs(plan)
    effects = dict(itertools.islice(effects_of(plan).items(), 8))
    for extra in (0.2, 0.5, 0.8):
        least, most = (sum(e[i].nbytes for e in effects.values()) for i in (0, 1))
        budget = plan.nbytes + int(extra * (most - least))
        found = allocate(plan, codecs, effects, budget)
        room = least + extra * (most - least)
        velocity, kl = (sum(getattr(e[0], key) for e in effects.values()) for key in ("velocity", "kl"))
        best = min(
            sum(e[i].velocity / velocity + e[i].kl / kl for e, i in zip(effects.values(), choice, strict=True))
            for choice in itertools.product((0, 1), repeat=8)
            if sum(e[i].nbytes for e, i in zip(effects.values(), choice, strict=True)) <= room
        )
        assert best <= found.cost * (1 + 1e-9)
        assert found.cost <= best * 1.5 + 0.02
        assert found.nbytes <= budget


def test_more_bytes_never_cost_more_and_all_bytes_take_the_finest(plan: Plan) -> None:
    codecs, effects = movable_codecs(plan), effects_of(plan)
    costs = [allocate(plan, codecs, effects, plan.nbytes + margin).cost for margin in (1000, 20_000, 10_000_000)]
    assert costs[0] >= costs[1] >= costs[2]
    assert costs[2] == pytest.approx(0.02)


def test_a_budget_below_the_smallest_is_refused_with_sizes(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"recipe base needs .* all layers in nf4, the budget is"):
        allocate(plan, movable_codecs(plan), effects_of(plan), 1000)


def test_one_format_leaves_nothing_to_choose() -> None:
    recipe = Recipe.parse("{name: one, rules: [{match: {}, codec: raw}]}", "one")
    plan = make_plan(Checkpoint.open(TINY), recipe)
    with pytest.raises(PlanError, match="recipe one names 0 lossy format"):
        movable_codecs(plan)


def test_the_recipe_that_is_written_gives_every_group_its_format_and_fits(plan: Plan) -> None:
    codecs, effects = movable_codecs(plan), effects_of(plan)
    budget = plan.nbytes + 20_000
    found = allocate(plan, codecs, effects, budget)
    assert 0 < sum(found.chosen.values()) < len(effects)  # both formats are used
    text = recipe_text(allocated_recipe(plan, found, "mixed"), "why\n\n" + found.table())
    rebuilt = make_plan(Checkpoint.open(TINY), Recipe.parse(text, "mixed"))
    assert rebuilt.nbytes <= budget
    from bagel.loading import parameter_path

    codec_of = {parameter_path(p.unit.specs[0].name): p.codec for p in rebuilt.placements}
    for group, index in found.chosen.items():
        assert {codec_of[path] for path in group.paths} == {codecs[index]}
    other = {
        p.unit.name: p.codec
        for p in rebuilt.placements
        if p.unit.name
        not in {q.unit.name for q in plan.placements if "layers" in q.unit.name and "language" in q.unit.name}
    }
    assert all(other[p.unit.name] == p.codec for p in plan.placements if p.unit.name in other)
