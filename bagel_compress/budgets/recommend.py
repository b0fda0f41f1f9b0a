"""Recommends packaged recipes and targets that fit; messages that something does not fit end with such a name.

A recipe lists the targets that it fits (`targets:`, checked by a test). If it fits one target, it also fits every
target with more memory that uses it in the same way (everything on the GPU, or the same residency).
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

# Error of calibrated rounding relative to rounding to nearest. It is 0.38 to 0.45 on BAGEL-nano (docs/calibration.md);
# a large model should gain less, since its layers' inputs are more varied.
CALIBRATED = 0.5


@dataclass(frozen=True, slots=True)
class Errors:
    """Expected relative error (root mean square) of all weights and of each expert's."""

    all: float
    gen: float
    und: float


def expected_errors(stored: Iterable[tuple[Codec, Iterable[TensorSpec]]]) -> Errors | None:
    """The expected errors of tensors stored by these codecs, from each codec's error on normal weights.

    None if a codec does not state that error.
    """
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


def target_variants(target: Target) -> list[Target]:
    """The target, and packaged targets that use a GPU of its size differently: first all on the GPU, then with offload.

    Of the packaged targets that use memory in the same way, it is the largest one not larger than this target. A target
    with an export has no variants.
    """
    if target.export is not None:
        return [target]
    found: dict[str, Target] = {_memory_use(target): target}
    for other in packaged_targets().values():
        known = found.get(_memory_use(other))
        if other.export or other.limit > target.limit or known is target:
            continue
        if known is None or (other.limit, -len(other.name)) > (known.limit, -len(known.name)):
            found[_memory_use(other)] = other
    return sorted(found.values(), key=lambda variant: (variant.residency is not None, variant.vae_on_host))


def recipes_for(target: Target) -> list[str]:
    """Names of the packaged recipes that fit the target by their own list of targets, by expected error."""
    kept = [
        name
        for name, recipe in packaged_recipes().items()
        if recipe.export is None and any(_covers(target, listed) for listed in recipe.targets)
    ]
    return sorted(kept, key=lambda name: (_error(name), name))


def recommendation(build: BuildOutline, target: Target) -> str:
    """For a build that does not fit: a packaged target or recipe that does, as one sentence; empty if none is known."""
    variants = target_variants(target)
    for variant in variants:
        if variant != target and _fits(build, variant):
            return f"It fits target {variant.name} ({variant.summary}): give --target {variant.name}."
    for variant in [target, *(v for v in variants if v != target)]:
        if names := recipes_for(variant):
            advise = f"`bagel-compress advise --target {target.name}` has more."
            return f"Recipe {names[0]} fits target {variant.name}; {advise}"
    return ""


def _fits(build: BuildOutline, target: Target) -> bool:
    if least_bytes(build.units, target, build.config.llm.num_layers) > target.limit:
        return False
    return not predict(build, target).broken


def _covers(target: Target, listed: str) -> bool:
    """Whether a recipe that fits the packaged target `listed` also fits this one."""
    other = packaged_targets().get(listed)
    same_work = other is not None and (other.sizes, set(other.tasks)) == (target.sizes, set(target.tasks))
    return other is not None and same_work and _memory_use(other) == _memory_use(target) and other.limit <= target.limit


def _memory_use(target: Target) -> str:
    return f"{sorted((target.residency or {}).items())} {target.residency is None} {target.vae_on_host}"


@cache
def _error(name: str) -> float:
    plan = make_plan(TrueHeader(), packaged_recipes()[name])
    errors = expected_errors((p.codec, p.unit.specs) for p in plan.placements)
    return float("inf") if errors is None else errors.all
