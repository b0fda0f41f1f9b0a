"""fit: the largest rate that a GPU holds, as a recipe that anyone can read and build again.

A recipe with rate-controlled formats (a codec with a field `bits`) is a family: one number, the rate of its first such
rule, moves all of them together. Each candidate is planned from the header and its peak predicted as `budget` does,
with the target's tasks, sizes and residency. Weights dominate, so the peak is close to a line in the rate: a few secant
steps end within SLACK of the GPU's usable memory, and the last prediction, not the line, decides that it fits.
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
from bagel_compress.budgets.promises import ways
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

SLACK = 0.003  # of the usable memory: closer than this to the limit is close enough
STEP = 0.01  # rates are multiples of it: what a reader can compare
TRIES = 8  # predictions at most; three or four are usual
FP8_ERROR = Fp8().normal_error  # from a rate on that has no more, a build is of the class of 8 bits


@dataclass(frozen=True, slots=True)
class Fitted:
    """A recipe that fits, and why: its prediction on the target, and the bytes of all weight shards."""

    recipe: Recipe
    bits: float
    report: BudgetReport
    target: Target
    nbytes: int
    measured: str = ""  # what rates of groups follow; empty: all have the same

    @property
    def peak(self) -> float:
        """Bytes of device memory at the highest phase."""
        return self.report.peak

    @property
    def slack(self) -> float:
        """Bytes of the target's limit that stay free."""
        return self.target.limit - self.report.peak

    def to_yaml(self) -> str:
        """The recipe as a file, with its reasons as comments."""
        return recipe_text(self.recipe, "\n".join(self._reasons()))

    def _reasons(self) -> list[str]:
        """What was asked, what was found, phase by phase."""
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
        """Least, mean and most bits of each kind of group over the layers, where groups have rates of their own."""
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
    """Relative error of normal weights at `bits` per weight, rounded alone."""
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

    `tasks` replaces the target's; `disk_gb` also limits the bytes of all weight shards, in 1e9. `folder` and `vae` are
    the configs and VAE of the checkpoint that `header` describes. With `effects`, what groups of weights cost in the
    family's format as `sensitivities` found it, each group gets a rate of its own (build/rates.py) and the rate that is
    found is their mean; `measured` says on what, for the file. Raises TargetError if no rate from 1.5 bits on fits,
    or if the recipe has no format with a rate.
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
    """The largest rate that holds all limits, by secant steps on the tightest of them."""

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
        bits = _stepped(start)
        for _ in range(TRIES):
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
        """Share of the tightest limit that is left; negative: broken."""
        room = fitted.slack / self.target.limit
        if self.disk_gb is not None:
            room = min(room, 1 - fitted.nbytes / (self.disk_gb * 1e9))
        return room

    def _next(self, tried: dict[float, Fitted]) -> float:
        """The rate to try next; one that was tried ends the search."""
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
        return _stepped(min(max(guess, low), high))

    def _too_small(self, smallest: Fitted) -> str:
        limit = self.target.limit / GIB
        others = [way.name for way in ways(self.target) if way.residency is not None and way.name != self.target.name]
        named = f" ({', '.join(others)})" if others else ""
        return (
            f"target {self.target.name}: even {smallest.bits:.2f} bits need {smallest.peak / GIB:.2f} GiB of "
            f"{limit:.2f}; give a target with residency{named}, fewer tasks, smaller pictures or a larger disk."
        )


def with_rate(family: Recipe, bits: float, target: Target, name: str | None = None) -> Recipe:
    """The family at a rate: the first rule with a rate gets `bits`, the others keep their distance from it.

    The recipe promises the target only if it comes with the package: others are not known where it is read.
    """
    first = next(rate for rule in family.rules if (rate := _rate(rule)) is not None)
    rules = tuple(_moved(rule, bits - first) for rule in family.rules)
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


def _moved(rule: Rule, by: float) -> Rule:
    rate = _rate(rule)
    if rate is None:
        return rule
    bits = _stepped(min(max(rate + by, MIN_BITS), MAX_BITS))
    return rule.model_copy(update={"codec": rule.codec.model_copy(update={"bits": bits})})


def _stepped(bits: float) -> float:
    return round(math.floor(bits / STEP + 1e-6) * STEP, 2)


def table(fitted: Iterable[Fitted]) -> str:
    """One line for each: target, rate, peak, what stays free, bytes on disk."""
    row = "{:<18}{:>6}{:>12}{:>12}{:>11}{:>12}".format
    lines = [row("target", "bits", "peak GiB", "limit GiB", "free MiB", "disk")]
    for f in fitted:
        peak, limit = f"{f.peak / GIB:.3f}", f"{f.target.limit / GIB:.3f}"
        free = f"{f.slack / 2**20:.0f}"
        lines.append(row(f.target.name, f"{f.bits:.2f}", peak, limit, free, size_text(f.nbytes)))
    return "\n".join(lines)
