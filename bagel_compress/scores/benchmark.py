"""Scores: what a model can still do, counted over many prompts, and how sure a difference to the original is.

A `Benchmark` is a list of prompts and a function that judges one answer; the nano one is in `nano.py`, and any other
(GenEval, MMMU, an own list) plugs in the same way. Every prompt is asked with its own seeded noise, so that two models
are compared prompt by prompt: `compare` gives the paired difference with a bootstrap interval, which is far narrower
than the difference of two averages. No network, no judge model, nothing drawn here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from bagel.loops import Loops, Request, Turn
from bagel.settings import FlowSettings, TextSettings
from bagel_compress.errors import TraceError

BOOTSTRAP_ROUNDS = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to a model. `wanted` is for the scorer alone; `size` (H, W) of a picture that no input decides."""

    kind: str
    turns: tuple[Turn, ...]
    output: Literal["image", "text"] = "image"
    think: bool = False
    size: tuple[int, int] | None = None
    wanted: Any = None
    guidance: str = ""  # which of the benchmark's flow settings; "" is the first

    @property
    def layout(self) -> tuple[Any, ...]:
        """Prompts of one layout can be asked in one batch."""
        turns = tuple("text" if isinstance(t, str) else t.size for t in self.turns)
        return self.output, self.think, self.size, self.guidance, turns


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model gave: a text, a picture, or thoughts and a picture."""

    text: str | None = None
    image: Image.Image | None = None


Scorer = Callable[[Prompt, Answer], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Prompts, and a scorer that gives each answer values in [0, 1] by category (a prompt may count in several)."""

    name: str
    prompts: tuple[Prompt, ...]
    score: Scorer
    flows: Mapping[str, FlowSettings] = field(default_factory=lambda: {"": FlowSettings()})
    text: TextSettings = field(default_factory=lambda: TextSettings(max_tokens=64))
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Scores:
    """Per category: prompt index -> value. `answers` are in the order of the prompts."""

    benchmark: str
    values: Mapping[str, Mapping[int, float]]
    answers: tuple[Answer, ...]

    def mean(self, category: str) -> float:
        """Average of a category."""
        return float(np.mean(list(self.values[category].values())))

    def interval(self, category: str, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the average."""
        return _bootstrap(np.fromiter(self.values[category].values(), np.float64), seed)


@dataclass(frozen=True, slots=True)
class Difference:
    """A category of a candidate against the reference, prompt by prompt. `low` and `high` bound `delta`."""

    category: str
    prompts: int
    reference: float
    candidate: float
    low: float
    high: float

    @property
    def delta(self) -> float:
        return self.candidate - self.reference

    @property
    def significant(self) -> bool:
        """Whether the interval excludes no difference."""
        return self.low > 0 or self.high < 0


def run(
    benchmark: Benchmark, sampler: Loops, batch: int = 64, on_batch: Callable[[int, int], None] | None = None
) -> Scores:
    """Asks every prompt and scores the answers. `on_batch` hears how many of how many are done.

    Prompts of one layout are asked together, at most `batch` of them; batches change answers by rounding alone.
    """
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, prompt in enumerate(benchmark.prompts):
        groups[prompt.layout].append(index)
    answers: dict[int, Answer] = {}
    for indexes in groups.values():
        together = _together(benchmark, benchmark.prompts[indexes[0]], batch)
        for start in range(0, len(indexes), together):
            part = indexes[start : start + together]
            answers |= zip(part, ask(benchmark, sampler, part), strict=True)
            if on_batch:
                on_batch(len(answers), len(benchmark.prompts))
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for index, prompt in enumerate(benchmark.prompts):
        for category, value in benchmark.score(prompt, answers[index]).items():
            values[category][index] = float(value)
    return Scores(benchmark.name, dict(values), tuple(answers[i] for i in range(len(benchmark.prompts))))


def compare(candidate: Scores, reference: Scores, seed: int = 0) -> list[Difference]:
    """Paired differences of every category. Raises TraceError if the two did not answer the same prompts."""
    if candidate.benchmark != reference.benchmark or len(candidate.answers) != len(reference.answers):
        raise TraceError(
            f"scores of {candidate.benchmark} ({len(candidate.answers)} prompts) cannot be compared with those of"
            f" {reference.benchmark} ({len(reference.answers)} prompts); score both with the same benchmark."
        )
    found = []
    for category, values in reference.values.items():
        other = candidate.values.get(category, {})
        shared = sorted(values.keys() & other.keys())
        if not shared:
            continue
        ours = np.array([other[i] for i in shared])
        theirs = np.array([values[i] for i in shared])
        low, high = _bootstrap(ours - theirs, seed)
        found.append(Difference(category, len(shared), float(theirs.mean()), float(ours.mean()), low, high))
    return found


def same_answers(candidate: Scores, reference: Scores) -> float:
    """Share of text answers that are equal, word for word (thoughts included); 1.0 if there are none."""
    pairs = [(a.text, b.text) for a, b in zip(candidate.answers, reference.answers, strict=True) if b.text is not None]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 1.0


def picture_psnr(candidate: Scores, reference: Scores) -> list[float]:
    """PSNR in dB of every picture to the reference's; infinite where they are equal."""
    values = []
    for a, b in zip(candidate.answers, reference.answers, strict=True):
        if a.image is not None and b.image is not None:
            error = np.asarray(a.image, np.float64) - np.asarray(b.image, np.float64)
            mse = float(np.mean(error**2))
            values.append(10 * np.log10(255**2 / mse) if mse else float("inf"))
    return values


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (BOOTSTRAP_ROUNDS, len(values)))].mean(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


# --- asking -----------------------------------------------------------------------------------------------------------


def ask(benchmark: Benchmark, sampler: Loops, indexes: Sequence[int]) -> list[Answer]:
    """Answers to prompts of one layout, each with its own noise: what they are asked alone, up to rounding."""
    first = benchmark.prompts[indexes[0]]
    found = sampler.run_batch(
        [request(benchmark, index) for index in indexes],
        output=first.output,
        think=first.think,
        flow=flow_of(benchmark, first),
        text=benchmark.text,
    )
    return [Answer(result.text, result.image) for result in found]


def request(benchmark: Benchmark, index: int) -> Request:
    """A prompt of the benchmark as a sample of a batch, with the noise that is its own."""
    prompt = benchmark.prompts[index]
    return Request(prompt.turns, prompt.size, benchmark.seed * 1_000_003 + index)


def flow_of(benchmark: Benchmark, prompt: Prompt) -> FlowSettings:
    """The settings that a prompt is drawn with."""
    return benchmark.flows.get(prompt.guidance) or next(iter(benchmark.flows.values()))


def _together(benchmark: Benchmark, prompt: Prompt, batch: int) -> int:
    """How many prompts of this one's layout may share a pass: one, where guidance is scaled by a batch's norm."""
    flow = flow_of(benchmark, prompt)
    scaled = prompt.output == "image" and flow.cfg_renorm_type == "global" and flow.cfg_renorm_min < 1
    return 1 if scaled else batch
