"""What `fit` finds at the released model's sizes: the shipped recipes, and builds of their planned size. Slow."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bagel_compress.budgets.fit import Fitted, fit
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs.ecq import Ecq
from bagel_compress.codecs.ecq.layout import MAX_BITS
from bagel_compress.io.packaged import find_recipe
from bagel_compress.run.target import Target
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.released_header import TrueHeader
from bagel_compress.source.synthetic import synthesise

pytestmark = pytest.mark.slow
GIB = 2**30
DOCS = Path(__file__).parents[2] / "docs/ecq.md"
HEADERS = 1 << 16  # bytes by which the shards' headers may be shorter than planned


def fitted(target: Target) -> Fitted:
    return fit(Recipe.load(find_recipe("ecq-12gb")), TrueHeader(), target)


@pytest.mark.parametrize("name", ["8gb", "12gb", "16gb", "24gb"])
def test_a_shipped_recipe_is_the_one_that_fit_finds_and_leaves_less_than_a_hundredth(name: str) -> None:
    shipped, found = Recipe.load(find_recipe(f"ecq-{name}")), fitted(Target.load(name))
    assert found.recipe.rules == shipped.rules
    assert found.slack >= 0
    assert found.slack < 0.01 * found.target.limit or found.bits == MAX_BITS


ROW = r"\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) GiB \| (\d+) MiB \|"


@pytest.mark.parametrize(("name", "bits", "peak", "free"), re.findall(ROW, DOCS.read_text("utf-8")))
def test_a_row_of_the_docs_is_what_fit_finds(name: str, bits: str, peak: str, free: str) -> None:
    """GPUs for which no recipe is shipped."""
    found = fitted(Target.load(name))
    used = (found.target.limit - found.slack) / GIB
    assert (f"{found.bits:.2f}", f"{used:.3f}", f"{found.slack / 2**20:.0f}") == (bits, peak, free)
    assert found.slack < 0.01 * found.target.limit or found.bits == MAX_BITS


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "source"
    synthesise("7b-mot", folder, seed=0, layers=2)
    return folder


@pytest.mark.parametrize(("name", "gib"), [("8gb", 7.2), ("12gb", 11.3)])
def test_a_recipe_for_a_part_of_a_gpu_is_built_at_its_planned_size(
    two_layers: Path, tmp_path: Path, name: str, gib: float
) -> None:
    """Rounded to nearest, since a calibration set needs the released weights: the plan's sizes are the same."""
    target = Target.load(name)
    budget = target.budget.model_copy(update={"peak_gib": gib})
    found = fitted(target.model_copy(update={"budget": budget}))
    assert 0.99 * gib * GIB < found.peak <= gib * GIB
    rules = [
        rule.model_copy(update={"codec": Ecq(bits=rule.codec.bits)}) if isinstance(rule.codec, Ecq) else rule
        for rule in found.recipe.rules
    ]
    checkpoint = Checkpoint.open(str(two_layers))
    plan = make_plan(checkpoint, found.recipe.model_copy(update={"rules": tuple(rules)}))
    artifact = compress(plan, checkpoint, tmp_path / "build")
    coded = [p for p in plan.placements if isinstance(p.codec, Ecq)]
    assert len(coded) == 29  # seven matrices of two experts in two layers, and the embedding
    for placement in coded:
        bits = placement.codec.bits  # type: ignore[attr-defined]
        assert bits - 0.02 <= rate(artifact, placement.unit.name) <= bits
    for matrix in ("self_attn.k_proj", "self_attn.q_proj_moe_gen", "mlp.down_proj"):
        name = f"language_model.model.layers.1.{matrix}.weight"
        assert 0 <= rate(artifact, name) - entropy_of_codes(artifact, name) <= 0.08
    stored = sum((artifact.path / shard).stat().st_size for shard in artifact.manifest.shards)
    weights = sum(p.unit.numel for p in coded)
    assert plan.nbytes - 0.02 / 8 * weights - HEADERS <= stored <= plan.nbytes


def rate(artifact: Artifact, name: str) -> float:
    """Stored bits per weight, everything included."""
    return 8 * sum(part.nbytes for part in artifact.parts(name).values()) / artifact.unit(name).numel


def entropy_of_codes(artifact: Artifact, name: str) -> float:
    """Bits of the multiples of the step that a matrix is decoded to."""
    step = artifact.parts(name)[f"{name}.step"].float()
    codes = torch.round(artifact.decode(name)[name].float() / step).to(torch.int32).numpy().reshape(-1)
    share = np.bincount(codes - codes.min()) / codes.size
    return -math.fsum(float(p) * math.log2(p) for p in share if p)
