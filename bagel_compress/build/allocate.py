"""Allocation: assigns one of a recipe's formats to each group of weights, with the least loss within a given size.

The effects of groups are assumed to add up. Errors of velocities and KL divergence have equal weight, each relative to
its value with all groups in the smallest format; if only one counted, the other expert would get no bytes. The knapsack
problem is solved with a Lagrange multiplier: every group takes the format with the least cost + price * bytes, at the
lowest price per byte at which all fit; remaining bytes go to the best changes that still fit. The result is a recipe
with ordinary rules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from bagel.layout import official_role
from bagel.loading import parameter_path
from bagel_compress.build.plan import Plan
from bagel_compress.build.recipe import Match, Recipe, Rule
from bagel_compress.build.sensitivity import GROUPS, Effect, Group
from bagel_compress.build.sizes import size_text
from bagel_compress.codecs.base import Codec
from bagel_compress.errors import PlanError

HALVINGS = 200  # steps of the bisection for the price


@dataclass(frozen=True, slots=True)
class Allocation:
    """A format for every group, as an index into the codecs."""

    codecs: tuple[Codec, ...]
    effects: Mapping[Group, Sequence[Effect]]
    chosen: Mapping[Group, int]
    nbytes: int  # of all shards
    cost: float  # 2.0 is the cost with all groups in the smallest format

    def table(self) -> str:
        """A text table of the groups and their formats, by their cost in the smallest format, the highest first."""
        costs, smallest = shares_of_cost(self.effects), _smallest(self.effects)
        lines = ["layer expert group      velocity        KL  chosen"]
        for group in sorted(self.effects, key=lambda g: -costs[g][smallest]):
            effect, codec = self.effects[group][smallest], self.codecs[self.chosen[group]]
            label = f"{group.layer:5d} {group.expert:6s} {group.name:8s}"
            lines.append(f"{label} {effect.velocity:11.3e} {effect.kl:9.2e}  {codec.format}")
        lines.append(
            f"all shards {size_text(self.nbytes)}; cost {self.cost:.3f} (2: all groups in the smallest format)"
        )
        return "\n".join(lines)


def movable_codecs(plan: Plan) -> tuple[Codec, ...]:
    """The lossy formats of a plan, each once, in the order of its rules. Raises PlanError if there is only one."""
    found = [rule.codec for rule in plan.recipe.rules if not rule.codec.lossless]
    codecs = tuple(codec for i, codec in enumerate(found) if codec not in found[:i])
    if len(codecs) < 2:
        raise PlanError(
            f"recipe {plan.recipe.name} names {len(codecs)} lossy format, allocation chooses between two or more; name"
            " another one in a rule, as nf4-lean does with int8."
        )
    return codecs


def allocate(plan: Plan, codecs: Sequence[Codec], effects: Mapping[Group, Sequence[Effect]], budget: int) -> Allocation:
    """The allocation of least cost whose shards have at most `budget` bytes. Raises PlanError if none has."""
    costs, smallest = shares_of_cost(effects), _smallest(effects)
    moved = (p for p in plan.placements if len(p.unit.specs) == 1 and group_of(p.unit.specs[0].name) in effects)
    fixed = plan.nbytes - sum(p.nbytes for p in moved)
    room = budget - fixed
    least = sum(effect[smallest].nbytes for effect in effects.values())
    while room >= least:
        chosen = _spend(_cheapest(effects, costs, room), effects, costs, room)
        nbytes = _moved(plan, codecs, chosen).nbytes
        if nbytes <= budget:
            cost = sum(costs[group][i] for group, i in chosen.items())
            return Allocation(tuple(codecs), effects, chosen, nbytes, cost)
        room -= nbytes - budget  # the bytes by which headers of shards are larger than assumed
    raise PlanError(
        f"recipe {plan.recipe.name} needs {size_text(fixed + least)} with all layers in {codecs[smallest].format},"
        f" the budget is {size_text(budget)}; give a larger one, or fewer bits to what lies outside the layers."
    )


def _moved(plan: Plan, codecs: Sequence[Codec], chosen: Mapping[Group, int]) -> Plan:
    """The plan with the chosen formats in place."""
    placements = []
    for p in plan.placements:
        group = group_of(p.unit.specs[0].name) if len(p.unit.specs) == 1 else None
        placements.append(replace(p, codec=codecs[chosen[group]]) if group is not None and group in chosen else p)
    return replace(plan, placements=tuple(placements))


def shares_of_cost(effects: Mapping[Group, Sequence[Effect]]) -> dict[Group, list[float]]:
    """The cost of each format for each group: velocity error and KL, relative to the sums in the smallest format."""
    smallest = _smallest(effects)
    velocity = sum(e[smallest].velocity for e in effects.values()) or 1.0
    kl = sum(e[smallest].kl for e in effects.values()) or 1.0
    return {group: [e.velocity / velocity + e.kl / kl for e in found] for group, found in effects.items()}


def _smallest(effects: Mapping[Group, Sequence[Effect]]) -> int:
    first = next(iter(effects.values()))
    totals = [sum(e[i].nbytes for e in effects.values()) for i in range(len(first))]
    return totals.index(min(totals))


def _cheapest(
    effects: Mapping[Group, Sequence[Effect]], costs: Mapping[Group, Sequence[float]], room: int
) -> dict[Group, int]:
    """The formats chosen at the lowest price per byte at which all groups fit."""

    def at(price: float) -> dict[Group, int]:
        return {
            group: min(range(len(found)), key=lambda i: (costs[group][i] + price * found[i].nbytes, found[i].nbytes))
            for group, found in effects.items()
        }

    def fits(chosen: Mapping[Group, int]) -> bool:
        return sum(effects[group][i].nbytes for group, i in chosen.items()) <= room

    if fits(found := at(0.0)):
        return found
    low, high = 0.0, 1e3  # at 1000 costs a byte every group is in its smallest format
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    return at(high)


def _spend(
    chosen: dict[Group, int],
    effects: Mapping[Group, Sequence[Effect]],
    costs: Mapping[Group, Sequence[float]],
    room: int,
) -> dict[Group, int]:
    """Repeats the change of one group's format that lowers the cost most and still fits, until there is none."""
    left = room - sum(effects[group][i].nbytes for group, i in chosen.items())
    while True:
        changes = [
            (costs[group][now] - costs[group][i], group, i)
            for group, now in chosen.items()
            for i in range(len(costs[group]))
            if costs[group][i] < costs[group][now] and effects[group][i].nbytes - effects[group][now].nbytes <= left
        ]
        if not changes:
            return chosen
        _, group, i = max(changes, key=lambda change: change[0])
        left -= effects[group][i].nbytes - effects[group][chosen[group]].nbytes
        chosen[group] = i


def allocated_recipe(plan: Plan, allocation: Allocation, name: str) -> Recipe:
    """The plan's recipe with rules for the groups first, then those of its rules that still match a tensor."""
    by_format: dict[tuple[int, str, str], list[int]] = defaultdict(list)
    for group, index in sorted(allocation.chosen.items()):
        by_format[index, group.expert, group.name].append(group.layer)
    rules = [
        group_rule(allocation.codecs[i], expert, group, layers) for (i, expert, group), layers in by_format.items()
    ]
    summary = f"{plan.recipe.name} with formats allocated by measured sensitivity"
    rules += rules_of_the_rest(plan, allocation.chosen)
    return plan.recipe.model_copy(update={"name": name, "summary": summary, "rules": tuple(rules), "budget_gb": None})


def rules_of_the_rest(plan: Plan, groups: Container[Group]) -> list[Rule]:
    """The plan's rules that still match a tensor when the groups have their own rules."""
    specs = [spec for p in plan.placements for spec in p.unit.specs]
    taken = {spec.name for spec in specs if group_of(spec.name) in groups}
    rules = []
    for rule in plan.recipe.rules:
        own = [s.name for s in specs if s.name not in taken and rule.match.takes(s, official_role(s.name))]
        taken |= set(own)
        if own:
            rules.append(rule)
    return rules


def group_rule(codec: Codec, expert: str, group: str, layers: Sequence[int]) -> Rule:
    """The rule that assigns a codec to one kind of group in these layers (ascending)."""
    names = tuple(f"*.{linear}*" for linear in GROUPS[group])
    fields = {"component": "llm", "expert": expert, "kind": "linear", "layer": _ranges(layers), "name": names}
    return Rule(match=Match.model_validate(fields), codec=codec)


def _ranges(layers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for layer in layers:
        if found and found[-1][1] == layer - 1:
            found[-1] = (found[-1][0], layer)
        else:
            found.append((layer, layer))
    return tuple(found)


def group_of(name: str) -> Group | None:
    """The group of a tensor, by its official name."""
    role = official_role(name)
    if role.component != "llm" or role.kind != "linear" or role.layer is None:
        return None
    linear = parameter_path(name).split(".")[-2]
    group = next(group for group, linears in GROUPS.items() if linear in linears)
    return Group(role.layer, role.expert, group)
