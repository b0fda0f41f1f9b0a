"""Plan: the decision, from headers alone, which tensor gets which codec and lies in which shard.

Total by construction: every tensor has exactly one rule (the first that matches) and every rule is hit, else PlanError.
Shards follow the model (embeddings and head, one per decoder layer, the rest), so that names, sizes and resume points
are known before a byte is read. No torch, no weights: under a second for the full model.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, Protocol

from bagel.layout import Role, role_of
from bagel_compress.codecs.base import Codec, Unit
from bagel_compress.errors import PlanError
from bagel_compress.recipe import Recipe
from bagel_compress.spec import PartSpec, TensorSpec
from bagel_compress.tensorfile import file_bytes

LAYOUT = 1  # version of shard order and manifest; part of the digest


class Header(Protocol):
    """What a plan needs of a checkpoint: no data."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def specs(self) -> tuple[TensorSpec, ...]: ...


@dataclass(frozen=True, slots=True)
class Placement:
    """One unit, its codec and the shard (file name) it goes into."""

    unit: Unit
    codec: Codec
    shard: str

    @property
    def nbytes(self) -> int:
        return self.codec.nbytes(self.unit)


@dataclass(frozen=True)
class Plan:
    """All placements in building order: shard by shard, units in the order of their first tensor."""

    recipe: Recipe
    source_name: str
    source_revision: str
    source_digest: str
    shards: tuple[str, ...]
    placements: tuple[Placement, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that decides the artifact's bytes: tool version, recipe, source, every placement."""
        total = hashlib.sha256(f"bagel-compress {version('bagel-compress')} layout {LAYOUT}\n".encode())
        total.update(
            f"{self.recipe.digest}\n{self.source_name}\n{self.source_revision}\n{self.source_digest}\n".encode()
        )
        for p in self.placements:
            tensors = [(s.name, s.dtype, s.shape) for s in p.unit.specs]
            total.update(json.dumps([p.shard, p.unit.name, p.codec.model_dump(mode="json"), tensors]).encode())
        return total.hexdigest()

    @property
    def exact(self) -> bool:
        """False if a codec's size depends on the data; then all sizes are upper bounds."""
        return all(p.codec.exact for p in self.placements)

    @cached_property
    def shard_bytes(self) -> dict[str, int]:
        """File size of every shard, header included."""
        parts: dict[str, dict[str, PartSpec]] = {shard: {} for shard in self.shards}
        for p in self.placements:
            parts[p.shard] |= p.codec.parts(p.unit)
        return {shard: file_bytes(stored) for shard, stored in parts.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all shards (the VAE is copied beside them and not counted)."""
        return sum(self.shard_bytes.values())

    def in_shard(self, shard: str) -> list[Placement]:
        """The placements of one shard, in building order."""
        return [p for p in self.placements if p.shard == shard]

    @cached_property
    def groups(self) -> list[Group]:
        """Sizes by component, expert and codec."""
        return _groups((p.codec, p.unit.specs, p.nbytes) for p in self.placements)

    def table(self) -> str:
        """The groups as text, with totals."""
        return sizes_table(self.groups, self.nbytes, "" if self.exact else "at most ") + (
            f"\n{len(self.shards)} shards, largest {size_text(max(self.shard_bytes.values()))};"
            f" source {self.source_name} {self.source_digest[:12]}; plan {self.digest[:12]}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything the table says, and every placement."""
        return {
            "recipe": self.recipe.name,
            "digest": self.digest,
            "source": {"name": self.source_name, "revision": self.source_revision, "digest": self.source_digest},
            "exact": self.exact,
            "bytes": self.nbytes,
            "parameters": sum(g.parameters for g in self.groups),
            "groups": [g.to_json() for g in self.groups],
            "shards": self.shard_bytes,
            "units": [
                {"name": p.unit.name, "codec": p.codec.model_dump(mode="json"), "shard": p.shard, "bytes": p.nbytes}
                for p in self.placements
            ],
        }


@dataclass(frozen=True, slots=True)
class Group:
    """Sizes of what shares component, expert and codec."""

    component: str
    expert: str
    codec: str
    tensors: int
    parameters: int
    source_bytes: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Stored bits per parameter."""
        return 8 * self.nbytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        fields = ("component", "expert", "codec", "tensors", "parameters", "source_bytes", "nbytes")
        return {name: getattr(self, name) for name in fields} | {"bits": round(self.bits, 4)}


def make_plan(checkpoint: Header, recipe: Recipe) -> Plan:
    """Decides every tensor. Raises PlanError: unmatched tensor, idle rule, codec that cannot, size over budget."""
    taken = _assign(checkpoint.specs, recipe)
    order = {spec.name: i for i, spec in enumerate(checkpoint.specs)}
    units = [
        (unit, rule.codec) for rule, specs in zip(recipe.rules, taken, strict=True) for unit in rule.codec.units(specs)
    ]
    for unit, codec in units:
        codec.check(unit)
    places = sorted({_place(unit) for unit, _ in units})
    shards = {place: f"model-{i + 1:05d}-of-{len(places):05d}.safetensors" for i, place in enumerate(places)}
    units.sort(key=lambda item: (_place(item[0]), min(order[s.name] for s in item[0].specs)))
    placements = tuple(Placement(unit, codec, shards[_place(unit)]) for unit, codec in units)
    plan = Plan(recipe, checkpoint.name, checkpoint.revision, checkpoint.digest, tuple(shards.values()), placements)
    _check_budget(plan)
    return plan


def sizes_table(groups: Sequence[Group], nbytes: int, bound: str = "") -> str:
    """Text table of groups; the last line is the total, whose bytes include the files' headers."""
    row = "{:<10} {:<7} {:<6} {:>7} {:>15} {:>15} {:>7}".format
    lines = [row("component", "expert", "codec", "tensors", "parameters", "bytes", "bits")]
    for g in groups:
        lines.append(
            row(g.component, g.expert, g.codec, g.tensors, f"{g.parameters:,}", f"{g.nbytes:,}", f"{g.bits:.3f}")
        )
    tensors, parameters = sum(g.tensors for g in groups), sum(g.parameters for g in groups)
    source = sum(g.source_bytes for g in groups)
    lines.append(row("total", "", "", tensors, f"{parameters:,}", f"{nbytes:,}", f"{8 * nbytes / parameters:.3f}"))
    share = f"{nbytes / source:.1%} of {size_text(source)}"
    lines.append(f"{bound}{size_text(nbytes)} ({nbytes / 2**30:.3f} GiB), {share}")
    return "\n".join(lines)


def size_text(nbytes: float) -> str:
    """Bytes for people: GB from 100 MB up, else MB; powers of ten."""
    return f"{nbytes / 1e9:.3f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3f} MB"


def _assign(specs: Sequence[TensorSpec], recipe: Recipe) -> list[list[TensorSpec]]:
    """For every rule the tensors that it is the first to match."""
    taken: list[list[TensorSpec]] = [[] for _ in recipe.rules]
    for spec in specs:
        role = _role(spec)
        first = next((i for i, rule in enumerate(recipe.rules) if rule.match.takes(spec, role)), None)
        if first is None:
            where = f"{role.component}, {role.expert}, {role.kind}"
            raise PlanError(
                f"recipe {recipe.name} has no rule for {spec.name} ({where});"
                " add one, or end with `match: {}` and codec raw."
            )
        taken[first].append(spec)
    for i, (rule, own) in enumerate(zip(recipe.rules, taken, strict=True)):
        if not own:
            lost = sum(rule.match.takes(spec, _role(spec)) for spec in specs)
            reason = f"earlier rules take its {lost} tensors" if lost else "the checkpoint has none such"
            raise PlanError(
                f"recipe {recipe.name} rule {i + 1} matches no tensor ({rule.match}): {reason}; remove or move it."
            )
    return taken


def _role(spec: TensorSpec) -> Role:
    role = role_of(spec.name)
    assert role is not None, spec.name
    return role


def _place(unit: Unit) -> tuple[int, int]:
    """Sort key of a unit's shard: embeddings and head, then decoder layers, then the rest."""
    roles = [_role(spec) for spec in unit.specs]
    if all(role.kind in ("embedding", "head") for role in roles):
        return (0, 0)
    layers = {role.layer for role in roles}
    if len(layers) == 1 and all(role.component == "llm" for role in roles) and roles[0].layer is not None:
        return (1, roles[0].layer)
    return (2, 0)


def _groups(stored: Iterator[tuple[Codec, tuple[TensorSpec, ...], int]]) -> list[Group]:
    """Sums by component, expert and codec. A unit over several experts is split by its parameters."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0, 0, 0])
    for codec, specs, nbytes in stored:
        numel = sum(s.numel for s in specs)
        for spec in specs:
            role = _role(spec)
            row = sums[(role.component, role.expert, codec.format)]
            for i, value in enumerate((1, spec.numel, spec.nbytes, nbytes * spec.numel / numel)):
                row[i] += value
    return [Group(*key, int(n), int(p), int(s), round(b)) for key, (n, p, s, b) in sorted(sums.items())]


def _check_budget(plan: Plan) -> None:
    budget = plan.recipe.budget_gb
    if budget is None or plan.nbytes <= budget * 1e9:
        return
    largest = sorted(plan.groups, key=lambda g: -g.nbytes)[:3]
    named = ", ".join(f"{g.component} {g.expert} in {g.codec} {size_text(g.nbytes)}" for g in largest)
    raise PlanError(
        f"recipe {plan.recipe.name} needs {size_text(plan.nbytes)}, its budget is {budget:g} GB;"
        f" the largest parts are {named}: give one of them fewer bits, or raise budget_gb."
    )
