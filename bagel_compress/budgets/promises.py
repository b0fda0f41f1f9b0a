"""What comes with the package and would fit: the names that every "does not fit" ends with.

A recipe promises targets (`targets:`, held by a test). A promise made for a target holds on every larger GPU whose
memory is used the same way (everything on the GPU, or the same residency).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from bagel.layout import official_role
from bagel_compress.budgets.fake_model import BuildOutline
from bagel_compress.budgets.predict import least_bytes, predict
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs.base import Codec
from bagel_compress.codecs.calibrated import CalibratedCodec
from bagel_compress.io.packaged import resource, target_files
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.run.target import Target
from bagel_compress.source.released_header import TrueHeader

# What calibrated rounding leaves of the error of rounding each weight alone: 0.38 to 0.45 on BAGEL-nano
# (docs/calibration.md), whose layers' inputs are more alike than those of a large model.
CALIBRATED = 0.5


@dataclass(frozen=True, slots=True)
class Errors:
    """Expected relative error (root mean square) of the weights: of all, and of each expert."""

    all: float
    gen: float
    und: float


def expected_errors(stored: Iterable[tuple[Codec, Iterable[TensorSpec]]]) -> Errors | None:
    """From what each codec does to normal weights and what calibration leaves of it; None: a codec does not know."""
    sums: dict[str, list[float]] = {"": [0.0, 0.0], "gen": [0.0, 0.0], "und": [0.0, 0.0]}
    for codec, specs in stored:
        error = codec.normal_error
        if error is None:
            return None
        if isinstance(codec, CalibratedCodec) and codec.calibrated:
            error *= CALIBRATED
        for spec in specs:
            for key in {"", official_role(spec.name).expert} & sums.keys():
                sums[key][0] += spec.numel * error**2
                sums[key][1] += spec.numel
    mean = {key: (total / count) ** 0.5 if count else 0.0 for key, (total, count) in sums.items()}
    return Errors(mean[""], mean["gen"], mean["und"])


@cache
def packaged_recipes() -> Mapping[str, Recipe]:
    """The recipes that come with the package, by name."""
    return {path.stem: Recipe.load(path) for path in sorted(resource("recipes").glob("*.yaml"))}


@cache
def packaged_targets() -> Mapping[str, Target]:
    """The targets that come with the package, by name."""
    return {name: Target.load(path) for name, path in target_files().items()}


def ways(target: Target) -> list[Target]:
    """The target and the packaged ways to use a GPU of its size: everything on it first, then with parts elsewhere.

    Of the targets that use the memory in one way the largest that is not larger than this one. An export has one way.
    """
    if target.export is not None:
        return [target]
    found: dict[str, Target] = {_way(target): target}
    for other in packaged_targets().values():
        known = found.get(_way(other))
        if other.export or other.limit > target.limit or known is target:
            continue
        if known is None or (other.limit, -len(other.name)) > (known.limit, -len(known.name)):
            found[_way(other)] = other
    return sorted(found.values(), key=lambda way: (way.residency is not None, way.vae_on_host))


def promised(target: Target) -> list[str]:
    """Packaged recipes that promise to fit the target, from the least expected error on."""
    kept = [
        name
        for name, recipe in packaged_recipes().items()
        if recipe.export is None and any(_covers(target, promise) for promise in recipe.targets)
    ]
    return sorted(kept, key=lambda name: (_error(name), name))


def remedy(build: BuildOutline, target: Target) -> str:
    """The packaged target or recipe that would fit, as one sentence; empty if none is known."""
    for way in ways(target):
        if way != target and _fits(build, way):
            return f"It fits target {way.name} ({way.summary}): give --target {way.name}."
    for way in [target, *(way for way in ways(target) if way != target)]:
        if names := promised(way):
            return f"Recipe {names[0]} fits target {way.name}; `bagel-compress advise --target {target.name}` has more."
    return ""


def _fits(build: BuildOutline, target: Target) -> bool:
    if least_bytes(build.units, target, build.config.llm.num_layers) > target.limit:
        return False
    return not predict(build, target).broken


def _covers(target: Target, promise: str) -> bool:
    """Whether what fits the packaged target `promise` fits this one."""
    other = packaged_targets().get(promise)
    same_work = other is not None and (other.sizes, set(other.tasks)) == (target.sizes, set(target.tasks))
    return other is not None and same_work and _way(other) == _way(target) and other.limit <= target.limit


def _way(target: Target) -> str:
    return f"{sorted((target.residency or {}).items())} {target.residency is None} {target.vae_on_host}"


@cache
def _error(name: str) -> float:
    plan = make_plan(TrueHeader(), packaged_recipes()[name])
    errors = expected_errors((p.codec, p.unit.specs) for p in plan.placements)
    return float("inf") if errors is None else errors.all
