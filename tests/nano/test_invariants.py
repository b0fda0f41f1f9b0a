"""What must hold on the trained model: which change touches what, and that the default limits tell INT8 from INT3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from bagel.sampler import Sampler
from bagel_compress.build.compress import compress
from bagel_compress.build.limits import resolve
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import find_recipe, resource
from bagel_compress.parity.compare import Candidate, compare
from bagel_compress.parity.record import record_cases
from bagel_compress.parity.trace import TraceFile
from bagel_compress.run.case import load_cases
from bagel_compress.run.load import open_model
from bagel_compress.scores.benchmark import Scores, run
from bagel_compress.scores.nano import nano_benchmark
from bagel_compress.source.checkpoint import Checkpoint

CHECKPOINT = Path(__file__).parents[2] / "bagel_compress" / "data" / "BAGEL-nano"
BENCHMARK = nano_benchmark(draw=6, ask=14, edit=4, think=2)
CASES = ("draw_one", "draw_two", "edit_recolor", "ask_describe")


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return open_model(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(sampler: Sampler) -> Scores:
    return run(BENCHMARK, sampler)


@contextmanager
def changed(sampler: Sampler, part: str, bits: int = 3) -> Iterator[None]:
    """The matrices whose path holds `part`, rounded to 2^bits levels per row while inside."""
    kept = {n: p.detach().clone() for n, p in sampler.bagel.named_parameters() if part in n and p.ndim == 2}
    assert kept
    with torch.no_grad():
        for name in kept:
            weight = sampler.bagel.get_parameter(name)
            top = 2 ** (bits - 1) - 1
            scale = weight.abs().amax(1, keepdim=True) / top
            weight.copy_((weight / scale).round().clamp(-top - 1, top) * scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                sampler.bagel.get_parameter(name).copy_(value)


def pictures(scores: Scores, task: str) -> list[np.ndarray]:
    return [
        np.asarray(a.image)
        for p, a in zip(BENCHMARK.prompts, scores.answers, strict=True)
        if p.kind.startswith(task) and a.image is not None
    ]


def answers(scores: Scores) -> list[str | None]:
    return [a.text for p, a in zip(BENCHMARK.prompts, scores.answers, strict=True)]


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def test_generation_expert_does_not_touch_answers(sampler: Sampler, reference: Scores) -> None:
    with changed(sampler, ".gen."):
        found = run(BENCHMARK, sampler)
    assert answers(found) == answers(reference)
    assert not equal(pictures(found, "draw"), pictures(reference, "draw"))


def test_vit_does_not_touch_drawings(sampler: Sampler, reference: Scores) -> None:
    with changed(sampler, "vit.layers", bits=2):
        found = run(BENCHMARK, sampler)
    assert equal(pictures(found, "draw"), pictures(reference, "draw"))
    assert not equal(pictures(found, "edit"), pictures(reference, "edit"))


def test_df11_touches_nothing(tmp_path: Path, reference: Scores) -> None:
    found = run(BENCHMARK, open_model(_built("df11", tmp_path), dtype=torch.float32))
    assert answers(found) == answers(reference)
    for task in ("draw", "edit", "think"):
        assert equal(pictures(found, task), pictures(reference, task))


def test_default_limits_catch_int3_and_pass_int8(tmp_path: Path, sampler: Sampler) -> None:
    trace = _trace(sampler, tmp_path)
    with changed(sampler, ".gen."):
        report = compare(Candidate(sampler, "int3", "", "4-bit", resolve("4-bit", {})), [trace]).report
    assert [row.metric for row in report.rows if not row.ok and row.metric == "latent.path"]
    int8 = open_model(_built("int8-24gb", tmp_path), dtype=torch.float32)
    report = compare(Candidate(int8, "int8", "", "8-bit", resolve("8-bit", {})), [trace]).report
    assert [row for row in report.rows if not row.ok] == []


def _built(recipe: str, folder: Path) -> Path:
    checkpoint = Checkpoint.open(CHECKPOINT)
    plan = make_plan(checkpoint, Recipe.load(find_recipe(recipe)))
    return compress(plan, checkpoint, folder / recipe).path


def _trace(sampler: Sampler, folder: Path) -> TraceFile:
    files = [resource("exports") / "cases" / "nano" / f"{name}.yaml" for name in CASES]
    return record_cases(sampler, "BAGEL-nano", "", load_cases(list(files)), folder / "trace.safetensors")
