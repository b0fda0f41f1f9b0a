"""Plan: assigns a codec and a shard to every tensor, from headers alone.

Every tensor gets the codec of the first rule that matches, and every rule has to match a tensor; otherwise PlanError.
Shards follow the model (one for embeddings and head, one per decoder layer, one for all other tensors), so that names,
sizes and resume points are known before any weight is read. It takes under a second for the full model, without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

from bagel.layout import official_role
from bagel_compress.build.recipe import Recipe
from bagel_compress.build.sizes import SizeGroup, group_sizes, sizes_table
from bagel_compress.codecs.base import Codec, Reader, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec
from bagel_compress.errors import PlanError
from bagel_compress.io.byte_size import size_text
from bagel_compress.io.safetensors_file import file_bytes
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    from bagel_compress.calibrate.calibration_set import CalibrationSet

LAYOUT = 3  # version of shard order and manifest; part of the digest


class CheckpointHeader(Protocol):
    """The properties of a checkpoint that a plan needs; no weights."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
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

    @property
    def calibrated(self) -> bool:
        """Whether its codes are chosen by calibrated rounding."""
        return isinstance(self.codec, CalibratedCodec) and self.codec.calibrated


@dataclass(frozen=True)
class Plan:
    """All placements in building order: shard by shard, units in the order of their first tensor."""

    recipe: Recipe
    source_name: str
    source_revision: str
    source_fingerprint: str  # Checkpoint.fingerprint
    shards: tuple[str, ...]
    placements: tuple[Placement, ...]
    sampled: int | None = (
        None  # bytes of all shards by a sample of the data; None: sizes are exact, or there is no data
    )
    calibration: CalibrationSet | None = None  # what the moments are taken from; None: nothing needs it, or not given

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that decides the artifact's bytes: tool version, recipe, source, every placement."""
        total = hashlib.sha256(f"bagel-compress {version('bagel-compress')} layout {LAYOUT}\n".encode())
        total.update(
            f"{self.recipe.digest}\n{self.source_name}\n{self.source_revision}\n{self.source_fingerprint}\n".encode()
        )
        for p in self.placements:
            tensors = [(s.name, s.dtype, s.shape) for s in p.unit.specs]
            total.update(json.dumps([p.shard, p.unit.name, p.codec.model_dump(mode="json"), tensors]).encode())
        if self.calibration is not None:
            total.update(f"calibration {self.calibration.digest}\n".encode())
        return total.hexdigest()

    @cached_property
    def calibrated(self) -> bool:
        """Whether the build needs a calibration set."""
        return any(p.calibrated for p in self.placements)

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
    def groups(self) -> list[SizeGroup]:
        """Sizes by component, expert and codec."""
        return group_sizes((p.codec, p.unit.specs, p.nbytes) for p in self.placements)

    def table(self) -> str:
        """The groups as text, with totals."""
        return sizes_table(self.groups, self.nbytes, "" if self.exact else "in the worst case ") + (
            f"{self._likely_text()}\n{len(self.shards)} shards, largest {size_text(max(self.shard_bytes.values()))};"
            f" source {self.source_name}, fingerprint {self.source_fingerprint[:12]} (identity not read yet);"
            f" plan {self.digest[:12]}{self._calibration_text()}"
        )

    def _likely_text(self) -> str:
        """A text line with the likely size, if sizes depend on the data."""
        if self.exact:
            return ""
        if self.sampled is not None:
            return f"\n{size_text(self.sampled)} by a sample of the data, which is what it will be"
        likely = sum(p.nbytes for placed in self.placements for p in placed.codec.likely_parts(placed.unit).values())
        return f"\n{size_text(likely)} with usual weights, which is what to expect; --source has them sampled"

    def _calibration_text(self) -> str:
        if self.calibration is not None:
            rows = self.calibration.rows
            return f"\ncalibration set {self.calibration.digest[:12]}: {rows.und:,} and {rows.gen:,} rows (und, gen)"
        return "\nrounding needs a calibration set; none is given" if self.calibrated else ""

    def to_json(self) -> dict[str, Any]:
        """Plain data for --json: the contents of the table, and every placement."""
        return {
            "recipe": self.recipe.name,
            "digest": self.digest,
            "source": {
                "name": self.source_name,
                "revision": self.source_revision,
                "fingerprint": self.source_fingerprint,
            },
            "calibrated": self.calibrated,
            "calibration": None if self.calibration is None else self.calibration.digest,
            "exact": self.exact,
            "bytes": self.nbytes,
            "sampled_bytes": self.sampled,
            "parameters": sum(g.parameters for g in self.groups),
            "groups": [g.to_json() for g in self.groups],
            "shards": self.shard_bytes,
            "units": [
                {"name": p.unit.name, "codec": p.codec.model_dump(mode="json"), "shard": p.shard, "bytes": p.nbytes}
                for p in self.placements
            ],
        }


def make_plan(checkpoint: CheckpointHeader, recipe: Recipe, calibration: CalibrationSet | None = None) -> Plan:
    """Assigns a codec and a shard to every tensor, from headers alone, in under a second and without torch.

    The plan has `nbytes` (bytes of all shards; an upper bound unless `exact`), `groups`, `shard_bytes`, `digest` and
    `table()`. `calibration` is the calibration set for a recipe with calibrated rounding; the default is the packaged
    set of this model, if there is one.

    Raises PlanError if no rule matches a tensor, a rule matches nothing, a codec cannot represent a tensor, or the size
    is over the recipe's budget; CalibrationError if the set is of another model or too small.

        plan = bc.make_plan(bc.Checkpoint.open("BAGEL-7B-MoT"), bc.Recipe.load("nf4-12gb"))
        print(plan.nbytes / 1e9, "GB")
        print(plan.table())
    """
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
    source = (checkpoint.name, checkpoint.revision, checkpoint.fingerprint)
    plan = Plan(recipe, *source, tuple(shards.values()), placements, _sampled(placements, checkpoint))
    _check_budget(plan)
    return _with_calibration(plan, checkpoint, calibration) if plan.calibrated else plan


def _with_calibration(plan: Plan, checkpoint: CheckpointHeader, calibration: CalibrationSet | None) -> Plan:
    from bagel_compress.calibrate.fitting import expect_fit, packaged_set

    for p in plan.placements:
        role = official_role(p.unit.specs[0].name)
        if p.calibrated and (role.component != "llm" or role.kind != "linear"):
            raise PlanError(
                f"recipe {plan.recipe.name} asks for calibrated rounding of {p.unit.name}; only the linear weights of"
                " the decoder layers have it: give this one rounding nearest."
            )
    files = getattr(checkpoint, "files", None)  # TrueHeader has no files, and so no tokenizer to compare
    if calibration is None:
        calibration = None if files is None else packaged_set({s.name: s.shape for s in checkpoint.specs}, files)
    if calibration is not None:
        expect_fit(calibration, checkpoint.specs, files, [p.unit.specs[0] for p in plan.placements if p.calibrated])
    return replace(plan, calibration=calibration)


def _assign(specs: Sequence[TensorSpec], recipe: Recipe) -> list[list[TensorSpec]]:
    """For every rule, the tensors for which it is the first match."""
    taken: list[list[TensorSpec]] = [[] for _ in recipe.rules]
    for spec in specs:
        role = official_role(spec.name)
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
            lost = sum(rule.match.takes(spec, official_role(spec.name)) for spec in specs)
            reason = f"earlier rules take its {lost} tensors" if lost else "the checkpoint has none such"
            raise PlanError(
                f"recipe {recipe.name} rule {i + 1} matches no tensor ({rule.match}): {reason}; remove or move it."
            )
    return taken


def _place(unit: Unit) -> tuple[int, int]:
    """Sort key of a unit's shard: embeddings and head, then decoder layers, then all others."""
    roles = [official_role(spec.name) for spec in unit.specs]
    if all(role.kind in ("embedding", "head") for role in roles):
        return (0, 0)
    layers = {role.layer for role in roles}
    if len(layers) == 1 and all(role.component == "llm" for role in roles) and roles[0].layer is not None:
        return (1, roles[0].layer)
    return (2, 0)


def _sampled(placements: Sequence[Placement], checkpoint: CheckpointHeader) -> int | None:
    """Bytes of all shards estimated from samples, if a codec's size depends on the data and weights are available."""
    if not isinstance(checkpoint, Reader) or all(p.codec.exact for p in placements):
        return None
    return sum(p.codec.sampled(p.unit, checkpoint) for p in placements)


def _check_budget(plan: Plan) -> None:
    budget = plan.recipe.budget_gb
    nbytes = plan.nbytes if plan.sampled is None else plan.sampled
    if budget is None or nbytes <= budget * 1e9 or (plan.sampled is None and not plan.exact):
        return
    largest = sorted(plan.groups, key=lambda g: -g.nbytes)[:3]
    named = ", ".join(f"{g.component} {g.expert} in {g.codec} {size_text(g.nbytes)}" for g in largest)
    raise PlanError(
        f"recipe {plan.recipe.name} needs {size_text(nbytes)}, its budget is {budget:g} GB;"
        f" the largest parts are {named}: give one of them fewer bits, or raise budget_gb."
    )
