"""Finds the largest rate (bits per weight) that a GPU's memory holds, and writes it as a recipe.

A recipe with rate-controlled formats (codecs with a field `bits`) defines a family of recipes: changing the rate of its
first such rule shifts the others by the same amount. Each candidate is planned from the header, and its peak memory is
predicted as by the command `budget`, with the target's tasks, sizes and residency. Weights dominate the peak, so it is
nearly linear in the rate: a few secant steps end within SLACK of the usable memory. Whether a rate fits is decided by
its own prediction, never by interpolation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from bagel.vae import VAEConfig
from bagel_compress.budgets.fake_model import OFFICIAL_VAE, BuildOutline
from bagel_compress.budgets.predict import predict
from bagel_compress.budgets.recommend import target_variants
from bagel_compress.build.plan import CheckpointHeader, Plan, make_plan
from bagel_compress.build.rates import rated_recipe
from bagel_compress.build.recipe import Limits, Recipe, Rule
from bagel_compress.build.recipe_text import recipe_text
from bagel_compress.build.sensitivity import Effect, Group
from bagel_compress.codecs.ecq import Ecq
from bagel_compress.codecs.ecq.layout import MAX_BITS, MIN_BITS
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.errors import TargetError
from bagel_compress.io.byte_size import size_text
from bagel_compress.io.packaged import FULL_CONFIGS, resource
from bagel_compress.parity.report_data import BudgetReport
from bagel_compress.run.target import GIB, Target, Task

SLACK = 0.003  # the search ends when less than this share of the usable memory is left
STEP = 0.01  # rates are multiples of this number of bits
MAX_PREDICTIONS = 8  # three or four are usual
FP8_ERROR = Fp8().normal_error  # a recipe whose expected error is not larger gets limits of class "8-bit"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A recipe that fits a target, with its prediction."""

    recipe: Recipe
    bits: float  # of the first rule with a rate; with rates by group, their mean
    report: BudgetReport  # the prediction on the target
    target: Target
    nbytes: int  # of all weight shards
    measured: str = ""  # the model that sensitivities were measured on; empty if all groups have the same rate

    @property
    def peak(self) -> float:
        """Bytes of device memory at the highest phase."""
        return self.report.peak

    @property
    def slack(self) -> float:
        """Bytes of the target's limit that are left free."""
        return self.target.limit - self.report.peak

    def to_yaml(self) -> str:
        """The recipe as a YAML file; comments say how it was found."""
        return recipe_text(self.recipe, "\n".join(self._reasons()))

    def _reasons(self) -> list[str]:
        """The lines of the comment: target, rate, peak memory of each phase."""
        usable = self.target.limit / GIB
        highest = max(self.report.phases, key=lambda phase: phase.total)
        return [
            f"The largest rate that {self.target.device.name} holds: {self.bits:.2f} bits per weight of the experts.",
            "",
            f"Target {self.target.name}: {usable:.2f} GiB usable, tasks {', '.join(self.target.tasks)}"
            + (", parts of the model in host memory." if self.target.residency else ", all of the model on the GPU."),
            f"Predicted peak {self.peak / GIB:.3f} GiB ({highest.name}); {self.slack / 2**20:.0f} MiB stay free.",
            f"On disk {size_text(self.nbytes)}. Relative error of normal weights at this rate without calibration:"
            f" {expected_error(self.bits):.3f}",
            "(NF4 0.092, FP8 0.026).",
            *self._rates(),
            "",
            *(f"{phase.name:<24}{phase.total / GIB:7.2f} GiB" for phase in self.report.phases),
        ]

    def _rates(self) -> list[str]:
        """A table of the lowest, mean and highest bits over the layers, if groups have rates of their own."""
        if not self.measured:
            return []
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for rule in self.recipe.rules:
            rate, match = _rate(rule), rule.match
            if rate is not None and match.layer and match.expert and match.name:
                layers = sum(b - a + 1 for a, b in match.layer)
                found[match.expert[0], " ".join(name.strip("*._") for name in match.name)] += [rate] * layers
        lines = [
            f"{expert} {names:<26}{min(bits):6.2f} {fmean(bits):6.2f} {max(bits):6.2f}"
            for (expert, names), bits in sorted(found.items())
        ]
        return ["", f"Rates by sensitivity, {self.measured}: least, mean and most bits over the layers.", "", *lines]


def expected_error(bits: float) -> float:
    """Relative error of normally distributed weights at `bits` per weight, each rounded to nearest."""
    return Ecq.model_validate({"bits": bits}).normal_error


def fit(
    family: Recipe,
    header: CheckpointHeader,
    target: Target,
    *,
    name: str | None = None,
    tasks: tuple[Task, ...] | None = None,
    disk_gb: float | None = None,
    effects: Mapping[Group, Effect] | None = None,
    measured: str = "",
    folder: Path = FULL_CONFIGS,
    vae: VAEConfig = OFFICIAL_VAE,
    say: Callable[[str], None] = lambda text: None,
) -> Fitted:
    """The recipe of `family` with the largest rate whose predicted peak is within the target's limit.

    `tasks` replaces the target's; `disk_gb` also limits the weight shards, in 1e9 bytes. `folder` holds the configs,
    and `vae` the sizes of the VAE, of the checkpoint that `header` describes. `effects` are the errors that groups of
    weights cause in the family's format, as `sensitivities` measured them: each group then gets a rate of its own
    (build/rates.py), and the search is for their mean; `measured` names the model they were measured on. `say` is
    called with a line per prediction. Raises TargetError if even 1.5 bits do not fit, or if the recipe has no format
    with a rate.
    """
    if tasks is not None:
        target = target.model_copy(update={"tasks": tasks})
    start = next((_rate(rule) for rule in family.rules if _rate(rule) is not None), None)
    if start is None:
        raise TargetError(f"recipe {family.name} has no format with a rate (bits: ...); give one such as ecq-12gb.")
    search = _Search(family, header, target, name, disk_gb, (folder, vae), effects, measured, say)
    return search.run(min(start, MAX_BITS))


@dataclass(slots=True)
class _Search:
    """Searches the largest rate that keeps all limits, by secant steps on the tightest of them."""

    family: Recipe
    header: CheckpointHeader
    target: Target
    name: str | None
    disk_gb: float | None
    model: tuple[Path, VAEConfig]
    effects: Mapping[Group, Effect] | None
    measured: str
    say: Callable[[str], None]

    def run(self, start: float) -> Fitted:
        tried: dict[float, Fitted] = {}
        bits = _rounded_down(start)
        for _ in range(MAX_PREDICTIONS):
            tried[bits] = found = self._at(bits)
            self.say(f"{bits:.2f} bits: peak {found.peak / GIB:.3f} of {self.target.limit / GIB:.3f} GiB")
            following = self._next(tried)
            if following in tried:
                break
            bits = following
        fitting = [rate for rate, fitted in tried.items() if self._room(fitted) >= 0]
        if not fitting:
            raise TargetError(self._too_small(tried[min(tried)]))
        return tried[max(fitting)]

    def _at(self, bits: float) -> Fitted:
        recipe = with_rate(self.family, bits, self.target, self.name)
        plan: Plan = make_plan(self.header, recipe)
        if self.effects:
            recipe = rated_recipe(plan, self.effects, (MIN_BITS, MAX_BITS))
            plan = make_plan(self.header, recipe)
        report = predict(BuildOutline.of_plan(plan, *self.model), self.target)
        return Fitted(recipe, bits, report, self.target, plan.nbytes, self.measured)

    def _room(self, fitted: Fitted) -> float:
        """The share of the tightest limit that is left; negative if it is broken."""
        room = fitted.slack / self.target.limit
        if self.disk_gb is not None:
            room = min(room, 1 - fitted.nbytes / (self.disk_gb * 1e9))
        return room

    def _next(self, tried: dict[float, Fitted]) -> float:
        """The rate to try next. A rate that was tried already ends the search."""
        rooms = {bits: self._room(fitted) for bits, fitted in tried.items()}
        good = max((bits for bits, room in rooms.items() if room >= 0), default=None)
        bad = min((bits for bits, room in rooms.items() if room < 0), default=None)
        if good is not None and (rooms[good] <= SLACK or good >= MAX_BITS):
            return good
        low = MIN_BITS if good is None else good + STEP
        high = MAX_BITS if bad is None else bad - STEP
        if high < low - STEP / 2:
            return good if good is not None else min(tried)
        if len(tried) == 1:
            (only,) = tried
            guess = only + (1.0 if rooms[only] > 0 else -1.0)
        else:
            a, b = sorted(tried, key=lambda bits: abs(rooms[bits]))[:2]
            slope = (rooms[b] - rooms[a]) / (b - a)
            guess = a - (rooms[a] - SLACK / 2) / slope if slope else (low + high) / 2
        return _rounded_down(min(max(guess, low), high))

    def _too_small(self, smallest: Fitted) -> str:
        limit = self.target.limit / GIB
        variants = target_variants(self.target)
        others = [v.name for v in variants if v.residency is not None and v.name != self.target.name]
        named = f" ({', '.join(others)})" if others else ""
        return (
            f"target {self.target.name}: even {smallest.bits:.2f} bits need {smallest.peak / GIB:.2f} GiB of "
            f"{limit:.2f}; give a target with residency{named}, fewer tasks, smaller pictures or a larger disk."
        )


def with_rate(family: Recipe, bits: float, target: Target, name: str | None = None) -> Recipe:
    """The family's recipe at a rate: the first rule with a rate gets `bits`, the others are shifted by as much.

    The recipe lists the target only if it is a packaged one; another could not be found where the recipe is read.
    """
    first = next(rate for rule in family.rules if (rate := _rate(rule)) is not None)
    rules = tuple(_shifted(rule, bits - first) for rule in family.rules)
    packaged = {path.stem for path in resource("exports").glob("*.yaml")}
    level = "8-bit" if expected_error(bits) <= FP8_ERROR else "4-bit"
    return family.model_copy(
        update={
            "name": name or f"{family.name.split('-')[0]}-{target.name}",
            "summary": f"experts entropy-coded at {bits:.2f} bits, the most that {target.device.name} holds",
            "rules": rules,
            "limits": Limits.model_validate({"class": level}),
            "targets": (target.name,) if target.name in packaged else (),
            "budget_gb": None,
        }
    )


def _rate(rule: Rule) -> float | None:
    return getattr(rule.codec, "bits", None)


def _shifted(rule: Rule, by: float) -> Rule:
    rate = _rate(rule)
    if rate is None:
        return rule
    bits = _rounded_down(min(max(rate + by, MIN_BITS), MAX_BITS))
    return rule.model_copy(update={"codec": rule.codec.model_copy(update={"bits": bits})})


def _rounded_down(bits: float) -> float:
    return round(math.floor(bits / STEP + 1e-6) * STEP, 2)


def table(fitted: Iterable[Fitted]) -> str:
    """A text table with a line for each: target, rate, peak, free memory, bytes on disk."""
    row = "{:<18}{:>6}{:>12}{:>12}{:>11}{:>12}".format
    lines = [row("target", "bits", "peak GiB", "limit GiB", "free MiB", "disk")]
    for f in fitted:
        peak, limit = f"{f.peak / GIB:.3f}", f"{f.target.limit / GIB:.3f}"
        free = f"{f.slack / 2**20:.0f}"
        lines.append(row(f.target.name, f"{f.bits:.2f}", peak, limit, free, size_text(f.nbytes)))
    return "\n".join(lines)
