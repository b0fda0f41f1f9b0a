"""NF4 at no more bytes than the official app's: nearer to the original, in pictures and on the way to them."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest
import torch

from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import find_recipe, resource
from bagel_compress.parity import replay
from bagel_compress.parity.distances import measure
from bagel_compress.parity.trace import Trace
from bagel_compress.run.case import load_cases
from bagel_compress.run.load import open_model
from bagel_compress.scores.benchmark import picture_psnr, run
from bagel_compress.scores.nano import nano_benchmark
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.released_header import TrueHeader

ROOT = Path(__file__).parents[2]
MODELS = {
    "nano": (ROOT / "bagel_compress/data/BAGEL-nano", ("nano/draw_one", "nano/draw_two", "nano/edit_recolor")),
    "tiny": (ROOT / "tests/data/golden/checkpoint", ("tiny/t2i_square", "tiny/edit", "tiny/think_t2i")),
}
# What the official app codes in NF4, with searched scales; the bridges in INT8, paid for by tables in FP8.
EQUAL = """
name: equal
rules:
  - match: {component: [latent, time, connector], kind: linear}
    codec: int8
  - match: {kind: [linear, head]}
    codec: {format: nf4, scale: mse}
  - match: {kind: embedding}
    codec: fp8
  - match: {}
    codec: raw
"""


def shipped(name: str) -> Recipe:
    return Recipe.load(find_recipe(name))


@pytest.fixture(params=sorted(MODELS), scope="module")
def model(request: pytest.FixtureRequest) -> tuple[Checkpoint, list[Trace]]:
    """A checkpoint, and what its full-precision model does in a few cases, in fp32: only coding errors count."""
    folder, cases = MODELS[request.param]
    reference = open_model(folder, dtype=torch.float32)
    files = [resource("exports") / "cases" / f"{case}.yaml" for case in cases]
    return Checkpoint.open(folder), [replay.record(reference, case, place) for case, place in load_cases(files)]


def distances(recipe: Recipe, model: tuple[Checkpoint, list[Trace]], out: Path) -> tuple[int, float]:
    """Bytes, median error of the latent."""
    checkpoint, traces = model
    artifact = compress(make_plan(checkpoint, recipe), checkpoint, out / recipe.name)
    sampler = open_model(artifact.path, dtype=torch.float32)
    found = [measure(t, replay.replay(sampler, t), replay.rerun(sampler, t)).metrics for t in traces]
    return artifact.nbytes, median(m["latent.path"] for m in found)


def test_a_recipe_of_no_more_bytes_is_nearer(model: tuple[Checkpoint, list[Trace]], tmp_path: Path) -> None:
    official = distances(shipped("nf4-official"), model, tmp_path)
    equal = distances(Recipe.parse(EQUAL, "equal"), model, tmp_path)
    assert equal[0] <= official[0]
    assert equal[1] < official[1]
    lean = distances(shipped("nf4-lean"), model, tmp_path)  # larger at these proportions, smaller at BAGEL's
    assert lean[1] < official[1]


def test_its_pictures_are_nearer_too(tmp_path: Path) -> None:
    """Medians of 48 drawings and 24 edits of BAGEL-nano: the PSNR of a few pictures scatters by 4 dB.

    Of all 72 together, `equal` is slightly behind (40.6 against 40.8 dB, docs/decisions.md): no clear gain there.
    """
    source, benchmark = Checkpoint.open(MODELS["nano"][0]), nano_benchmark(48, 0, 24, 0)
    reference = run(benchmark, open_model(MODELS["nano"][0], dtype=torch.float32))

    def psnr(recipe: Recipe) -> tuple[float, float]:
        artifact = compress(make_plan(source, recipe), source, tmp_path / recipe.name)
        values = picture_psnr(run(benchmark, open_model(artifact.path, dtype=torch.float32)), reference)
        return median(values[:48]), median(values[48:])

    official = psnr(shipped("nf4-official"))
    for recipe in (Recipe.parse(EQUAL, "equal"), shipped("nf4-lean")):
        drawn, edited = psnr(recipe)
        assert drawn > official[0], recipe.name
        assert edited > official[1], recipe.name


def test_lean_is_smaller_than_official_at_bagels_proportions() -> None:
    lean, official, equal = (
        make_plan(TrueHeader(), r).nbytes
        for r in (shipped("nf4-lean"), shipped("nf4-official"), Recipe.parse(EQUAL, "equal"))
    )
    assert lean < official
    assert equal < official
