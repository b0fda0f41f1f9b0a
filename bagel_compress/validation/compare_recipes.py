"""Compresses one model by several recipes and compares the results: bytes, distances, scores and pictures.

Every recipe is compressed, compared with one trace of the source, and scored in processes that run side by side, one
per core. An existing build is not made again.
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
from typing import TYPE_CHECKING, Any

from bagel_compress.build.limits import Metric
from bagel_compress.parity.report_data import ParityReport
from bagel_compress.run.case import Case

if TYPE_CHECKING:
    from PIL import Image

    from bagel_compress.scores.benchmark import Benchmark, Scores

Say = Callable[[str], None]
SHOWN = {"draw.one": 3, "draw.two": 3, "edit": 4, "think": 2}  # start of a prompt's kind -> its pictures on the page
CATEGORIES = ("one", "two", "ask", "edit", "think")


@dataclass(frozen=True, slots=True)
class PictureColumn:
    """The request behind a column of pictures on the page."""

    text: str  # the prompt
    before: bytes | None  # PNG of an edit's input


@dataclass(frozen=True, slots=True)
class Tile:
    """A picture as PNG, and whether the scorer found everything in it right."""

    png: bytes
    right: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """A model's results on the nano benchmark."""

    scores: Mapping[str, float]  # category -> share of right answers
    tiles: tuple[Tile, ...]  # one per PictureColumn


@dataclass(frozen=True, slots=True)
class RecipeResult:
    """The build of one recipe with its size, its distances from the source and its scores."""

    name: str
    summary: str
    nbytes: int  # of all shards
    page: Path
    report: ParityReport
    scored: Scored
    psnr: float  # dB against the source's pictures, median over all; infinite if equal
    equal_texts: float  # share of texts that equal the source's
    differences: Mapping[str, tuple[float, float]]  # category -> 95 % interval of the paired difference from the source

    @property
    def latent(self) -> float:
        """Median over cases of |error of the final latent| / |latent - noise|."""
        return _median(self.report, Metric.LATENT_PATH)

    @property
    def kl(self) -> float:
        """Median over cases of the mean KL divergence of the logits, in nats."""
        return _median(self.report, Metric.LOGITS_KL_MEAN)

    def to_json(self) -> dict[str, Any]:
        """The numbers; an infinite PSNR (equal pictures) is null."""
        return {
            "bytes": self.nbytes,
            "latent_path": self.latent,
            "logits_kl_mean": self.kl,
            "psnr_db": None if math.isinf(self.psnr) else self.psnr,
            "equal_texts": self.equal_texts,
            "scores": dict(self.scored.scores),
            "differences": {name: list(interval) for name, interval in self.differences.items()},
            "passed": self.report.passed,
            "page": str(self.page),
        }


@dataclass(frozen=True, slots=True)
class RecipeComparison:
    """The results of all recipes, and the scores of the source itself."""

    source_bytes: int
    source: Scored
    prompts: int
    columns: tuple[PictureColumn, ...]
    builds: tuple[RecipeResult, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """The number of prompts of each task in the benchmark."""

    draw: int = 16
    ask: int = 14
    edit: int = 4
    think: int = 4

    @property
    def total(self) -> int:
        return self.draw + self.ask + self.edit + self.think


def compare_recipes(
    source: Path, recipes: Sequence[Path], cases: Sequence[tuple[Case, Path]], out: Path, counts: Counts, say: Say
) -> RecipeComparison:
    """Builds and scores every recipe on `source` (a model like BAGEL-nano), in folders below `out`.

    `cases` are recorded as the trace of the source. Results are in the order of the recipes.
    """
    import torch

    from bagel_compress.source.checkpoint import Checkpoint
    from bagel_compress.validation.artifact import record_source

    out.mkdir(parents=True, exist_ok=True)
    trace = out / "reference.trace.safetensors"
    threads = torch.get_num_threads()
    _one_thread()  # as the processes below, so that sums are added in one order
    try:
        record_source(source, cases, trace, progress=say)
    finally:
        torch.set_num_threads(threads)
    workers = min(len(recipes) + 1, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        original = pool.submit(_score, source, counts)
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
    benchmark = _benchmark(counts)
    columns = tuple(_column(benchmark, index) for index in _shown(benchmark))
    return RecipeComparison(nbytes, _scored(benchmark, reference), counts.total, columns, tuple(builds))


# --- work of the processes --------------------------------------------------------------------------------------------


def _one_thread() -> None:
    """Sets torch to one thread: more would slow such small models down, and other processes use the other cores."""
    import torch

    torch.set_num_threads(1)


def _build(source: Path, recipe: Path, trace: Path, out: Path) -> None:
    from bagel_compress.build.compress import compress
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.source.checkpoint import Checkpoint
    from bagel_compress.validation.artifact import validate_artifact

    checkpoint = Checkpoint.open(source)
    compress(make_plan(checkpoint, Recipe.load(recipe)), checkpoint, out)
    validate_artifact(out, [trace])


def _score(model: Path, counts: Counts) -> Scores:
    from bagel_compress.run.load import open_model
    from bagel_compress.scores.benchmark import run

    return run(_benchmark(counts), open_model(model))


def _score_build(out: Path, counts: Counts, reference: Scores) -> RecipeResult:
    from bagel_compress.build.artifact import Artifact
    from bagel_compress.scores.benchmark import compare, picture_psnr, same_answers

    artifact, scores = Artifact.open(out), _score(out, counts)
    recipe = artifact.manifest.recipe
    return RecipeResult(
        recipe.name,
        recipe.summary,
        artifact.nbytes,
        out / "report.html",
        ParityReport.load(out, artifact.digest),
        _scored(_benchmark(counts), scores),
        median(picture_psnr(scores, reference)),
        same_answers(scores, reference),
        {d.category: (d.low, d.high) for d in compare(scores, reference) if d.category in CATEGORIES},
    )


# --- scores and pictures of the page ----------------------------------------------------------------------------------


def _benchmark(counts: Counts) -> Benchmark:
    from bagel_compress.scores.nano import nano_benchmark

    return nano_benchmark(counts.draw, counts.ask, counts.edit, counts.think)


def _shown(benchmark: Benchmark) -> list[int]:
    """Indexes of the first prompts of every kind of SHOWN."""
    found: list[int] = []
    for kind, count in SHOWN.items():
        found += [i for i, p in enumerate(benchmark.prompts) if p.kind.startswith(kind)][:count]
    return found


def _column(benchmark: Benchmark, index: int) -> PictureColumn:
    turns = benchmark.prompts[index].turns
    text = " ".join(turn for turn in turns if isinstance(turn, str))
    return PictureColumn(text, next((_png(turn) for turn in turns if not isinstance(turn, str)), None))


def _scored(benchmark: Benchmark, scores: Scores) -> Scored:
    tiles = []
    for index in _shown(benchmark):
        prompt, answer = benchmark.prompts[index], scores.answers[index]
        assert answer.image is not None
        tiles.append(Tile(_png(answer.image), min(benchmark.score(prompt, answer).values()) == 1.0))
    return Scored({name: scores.mean(name) for name in CATEGORIES if name in scores.values}, tuple(tiles))


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _median(report: ParityReport, metric: str) -> float:
    return median(case.metrics[metric] for case in report.cases if metric in case.metrics)
