"""Scores of a model on a benchmark, and the significance of a difference between two models.

A `Benchmark` is a list of prompts and a function that scores one answer; the one for BAGEL-nano is in `nano.py`, and
others (GenEval, MMMU, your own) are defined in the same way. Every prompt has its own seeded noise, so that two models
are compared prompt by prompt: `compare` gives the paired difference with a bootstrap interval, which is far narrower
than that of two independent averages.
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
    """One request to a model."""

    kind: str
    turns: tuple[Turn, ...]
    output: Literal["image", "text"] = "image"
    think: bool = False
    size: tuple[int, int] | None = None  # (H, W) of the picture; None if an input picture decides it
    wanted: Any = None  # the right answer, in the scorer's own form
    guidance: str = ""  # key of the flow settings in Benchmark.flows; "" is the first

    @property
    def layout(self) -> tuple[Any, ...]:
        """A key: prompts with the same layout can be run in one batch."""
        turns = tuple("text" if isinstance(t, str) else t.size for t in self.turns)
        return self.output, self.think, self.size, self.guidance, turns


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer: a text, a picture, or both (in think mode)."""

    text: str | None = None
    image: Image.Image | None = None


Scorer = Callable[[Prompt, Answer], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Prompts and a scorer, which maps an answer to values in [0, 1] by category; a prompt may count in several."""

    name: str
    prompts: tuple[Prompt, ...]
    score: Scorer
    flows: Mapping[str, FlowSettings] = field(default_factory=lambda: {"": FlowSettings()})  # by Prompt.guidance
    text: TextSettings = field(default_factory=lambda: TextSettings(max_tokens=64))
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one model on a benchmark."""

    benchmark: str
    values: Mapping[str, Mapping[int, float]]  # category -> index of the prompt -> value
    answers: tuple[Answer, ...]  # in the order of the prompts

    def mean(self, category: str) -> float:
        """Average of a category."""
        return float(np.mean(list(self.values[category].values())))

    def interval(self, category: str, seed: int = 0) -> tuple[float, float]:
        """The 95 % bootstrap interval of a category's average."""
        return _bootstrap(np.fromiter(self.values[category].values(), np.float64), seed)


@dataclass(frozen=True, slots=True)
class Difference:
    """The paired difference of two models in one category."""

    category: str
    prompts: int  # that both answered
    reference: float  # average
    candidate: float  # average
    low: float  # bounds of the 95 % interval of `delta`
    high: float

    @property
    def delta(self) -> float:
        """The candidate's average minus the reference's."""
        return self.candidate - self.reference


def run(
    benchmark: Benchmark, sampler: Loops, batch: int = 64, on_batch: Callable[[int, int], None] | None = None
) -> Scores:
    """Runs every prompt and scores the answers. `on_batch` is called with the numbers of prompts done and in all.

    Prompts of one layout run together, at most `batch` of them; batching changes answers only by rounding.
    """
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, prompt in enumerate(benchmark.prompts):
        groups[prompt.layout].append(index)
    answers: dict[int, Answer] = {}
    for indexes in groups.values():
        size = _batch_size(benchmark, benchmark.prompts[indexes[0]], batch)
        for start in range(0, len(indexes), size):
            part = indexes[start : start + size]
            answers |= zip(part, ask(benchmark, sampler, part), strict=True)
            if on_batch:
                on_batch(len(answers), len(benchmark.prompts))
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for index, prompt in enumerate(benchmark.prompts):
        for category, value in benchmark.score(prompt, answers[index]).items():
            values[category][index] = float(value)
    return Scores(benchmark.name, dict(values), tuple(answers[i] for i in range(len(benchmark.prompts))))


def compare(candidate: Scores, reference: Scores, seed: int = 0) -> list[Difference]:
    """The paired differences of every category. Raises TraceError if the two are not scores of the same prompts."""
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
    """The share of texts (thoughts included) that are equal in both; 1.0 if there are none."""
    pairs = [(a.text, b.text) for a, b in zip(candidate.answers, reference.answers, strict=True) if b.text is not None]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 1.0


def picture_psnr(candidate: Scores, reference: Scores) -> list[float]:
    """PSNR in dB of every picture against the reference's; infinite for equal ones."""
    values = []
    for a, b in zip(candidate.answers, reference.answers, strict=True):
        if a.image is not None and b.image is not None:
            error = np.asarray(a.image, np.float64) - np.asarray(b.image, np.float64)
            mse = float(np.mean(error**2))
            values.append(10 * np.log10(255**2 / mse) if mse else float("inf"))
    return values


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (BOOTSTRAP_ROUNDS, len(values)))].mean(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


# --- running prompts --------------------------------------------------------------------------------------------------


def ask(benchmark: Benchmark, sampler: Loops, indexes: Sequence[int]) -> list[Answer]:
    """The answers to prompts of one layout, run as one batch, each with its own noise."""
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
    """A prompt as a sample of a batch, with its own seed."""
    prompt = benchmark.prompts[index]
    return Request(prompt.turns, prompt.size, benchmark.seed * 1_000_003 + index)


def flow_of(benchmark: Benchmark, prompt: Prompt) -> FlowSettings:
    """The settings that a prompt is drawn with."""
    return benchmark.flows.get(prompt.guidance) or next(iter(benchmark.flows.values()))


def _batch_size(benchmark: Benchmark, prompt: Prompt, batch: int) -> int:
    """The largest batch for prompts of this layout: 1 if guidance is rescaled by a norm over the whole batch."""
    flow = flow_of(benchmark, prompt)
    scaled = prompt.output == "image" and flow.cfg_renorm_type == "global" and flow.cfg_renorm_min < 1
    return 1 if scaled else batch
