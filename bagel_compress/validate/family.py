"""Several builds of one model, judged side by side: bytes, distances, scores and pictures of each recipe.

Each recipe is compressed, compared with one trace of the source and scored in a process of its own, so that every core
works. A build that is already there is taken as it is.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bagel_compress.case import Case
from bagel_compress.reports import ParityReport

Say = Callable[[str], None]
SHOWN_PICTURES = 12


@dataclass(frozen=True, slots=True)
class Scored:
    """A model's answers to the nano benchmark: category -> share right, the first pictures as PNG, all texts."""

    scores: Mapping[str, float]
    pictures: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Build:
    """One recipe's build and what was found about it."""

    name: str
    summary: str
    nbytes: int  # of all shards
    page: Path
    report: ParityReport
    scored: Scored
    psnr: float  # dB, median over all pictures to those of the source; infinite where equal
    equal_texts: float  # share of answers equal word for word

    @property
    def velocity(self) -> float:
        """Median over cases of the worst relative L2 error of a step's velocity."""
        return _median(self.report, "velocity.rel_l2")

    @property
    def kl(self) -> float:
        """Median over cases of the mean KL divergence of the logits, nats."""
        return _median(self.report, "logits.kl_mean")

    def to_json(self) -> dict[str, Any]:
        """The numbers; an infinite PSNR (equal pictures) is null."""
        return {
            "bytes": self.nbytes,
            "velocity_rel_l2": self.velocity,
            "logits_kl_mean": self.kl,
            "psnr_db": None if math.isinf(self.psnr) else self.psnr,
            "equal_texts": self.equal_texts,
            "scores": dict(self.scored.scores),
            "passed": self.report.passed,
            "page": str(self.page),
        }


@dataclass(frozen=True, slots=True)
class Family:
    """The builds, and the source's own scores."""

    source_bytes: int
    source: Scored
    prompts: int
    builds: tuple[Build, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """How many prompts of each kind the benchmark asks."""

    draw: int = 16
    ask: int = 14
    edit: int = 4
    think: int = 4

    @property
    def total(self) -> int:
        return self.draw + self.ask + self.edit + self.think


def compare_recipes(
    source: Path, recipes: Sequence[Path], cases: Sequence[tuple[Case, Path]], out: Path, counts: Counts, say: Say
) -> Family:
    """Builds and judges every recipe on `source` (a model of the nano world) below `out`, in the recipes' order."""
    from bagel_compress.checkpoint import Checkpoint
    from bagel_compress.validate.judge import record_source

    _one_thread()
    out.mkdir(parents=True, exist_ok=True)
    trace = out / "reference.trace.safetensors"
    record_source(source, cases, trace, progress=say)
    workers = min(len(recipes) + 1, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        original = pool.submit(_score_source, source, counts)
        jobs = {pool.submit(_build, source, recipe, trace, out / recipe.stem): recipe.stem for recipe in recipes}
        for job in as_completed(jobs):
            job.result()
            say(f"{jobs[job]}: compressed and compared")
        reference = original.result()
        scored = {recipe.stem: pool.submit(_score_build, out / recipe.stem, counts, reference) for recipe in recipes}
        builds = []
        for name, future in scored.items():
            builds.append(future.result())
            say(f"{name}: scored")
    nbytes = sum(spec.nbytes for spec in Checkpoint.open(source).specs)
    return Family(nbytes, reference[0], counts.total, tuple(builds))


# --- what runs in a process of its own --------------------------------------------------------------------------------

_Answers = tuple[tuple[str | None, bytes | None], ...]  # text and PNG of every prompt


def _one_thread() -> None:
    """The models are so small that waking a second thread costs more than it does; processes use the other cores."""
    import torch

    torch.set_num_threads(1)


def _build(source: Path, recipe: Path, trace: Path, out: Path) -> None:
    from bagel_compress.checkpoint import Checkpoint
    from bagel_compress.plan import make_plan
    from bagel_compress.recipe import Recipe
    from bagel_compress.stream import compress
    from bagel_compress.validate.judge import validate_artifact

    checkpoint = Checkpoint.open(source)
    compress(make_plan(checkpoint, Recipe.load(recipe)), checkpoint, out)
    validate_artifact(out, [trace])


def _score_source(source: Path, counts: Counts) -> tuple[Scored, _Answers]:
    return _score(source, counts)


def _score_build(out: Path, counts: Counts, reference: tuple[Scored, _Answers]) -> Build:
    from bagel_compress.artifact import Artifact

    artifact = Artifact.open(out)
    scored, answers = _score(out, counts)
    pairs = list(zip(answers, reference[1], strict=True))
    texts = [a == b for (a, _), (b, _) in pairs if b is not None]
    recipe = artifact.manifest.recipe
    return Build(
        recipe.name,
        recipe.summary,
        artifact.nbytes,
        out / "report.html",
        ParityReport.load(out, artifact.digest),
        scored,
        median(_psnr(a, b) for (_, a), (_, b) in pairs if a is not None and b is not None),
        sum(texts) / len(texts),
    )


def _score(model: Path, counts: Counts) -> tuple[Scored, _Answers]:
    from bagel_compress.load import open_model
    from bagel_compress.validate.nano import nano_benchmark
    from bagel_compress.validate.scores import run

    found = run(nano_benchmark(counts.draw, counts.ask, counts.edit, counts.think), open_model(model))
    answers = []
    for answer in found.answers:
        data = io.BytesIO()
        if answer.image is not None:
            answer.image.save(data, "PNG")
        answers.append((answer.text, data.getvalue() or None))
    pictures = tuple(png for _, png in answers if png is not None)[:SHOWN_PICTURES]
    scores = {name: found.mean(name) for name in ("one", "two", "ask", "edit", "think") if name in found.values}
    return Scored(scores, pictures), tuple(answers)


def _psnr(png: bytes, reference: bytes) -> float:
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(io.BytesIO(data)), np.float64) for data in (png, reference))
    mse = float(np.mean((a - b) ** 2))
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def _median(report: ParityReport, metric: str) -> float:
    return median(case.metrics[metric] for case in report.cases if metric in case.metrics)
