"""Predicted memory of a training step: against a counted run on the CPU, and the figures of the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bagel_compress.budgets.fake_model import BuildOutline, FakeText
from bagel_compress.budgets.planned_build import checkpoint_sizes, planned_build
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import FinetuneError
from bagel_compress.finetune.config import FinetuneConfig
from bagel_compress.finetune.lora import add_adapters, parameters_of
from bagel_compress.finetune.memory import _run, predict_finetune
from bagel_compress.run.load import load_checkpoint
from bagel_compress.run.target import Target
from bagel_compress.source.checkpoint import Checkpoint

TINY = Path(__file__).parents[1] / "data" / "golden" / "checkpoint"
DOCS = Path(__file__).parents[2] / "docs" / "finetune.md"
ACTIVATIONS = "activations and scratch"


def target(side: int) -> Target:
    return Target.model_validate({
        "name": "card", "device": {"name": "a card of 24 GB", "memory_mib": 24564}, "tasks": ["t2i"],
        "sizes": {"image": [side, side], "input_image": [side, side]},
    })  # fmt: skip


def config(**more: object) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"model": "x", "steps": 1, "tokens": 4096, "lora": {}} | more)


@pytest.mark.parametrize("recompute", [True, False])
def test_fake_tensors_take_what_real_ones_take(recompute: bool) -> None:
    checkpoint = Checkpoint.open(TINY)
    asked = config(recompute=recompute, tokens=400)
    plan = make_plan(checkpoint, Recipe.load("raw"))
    build = BuildOutline.of_plan(plan, *checkpoint_sizes(checkpoint))
    report = predict_finetune(build, target(64), asked)
    predicted = {p.name.removeprefix("finetune: "): p.parts[ACTIVATIONS] for p in report.phases}
    sampler = load_checkpoint(checkpoint)
    sampler.text = FakeText()
    assert asked.lora is not None
    trained = parameters_of(add_adapters(sampler.bagel, asked.lora, 0))
    counted = {p.name: p.by_category[ACTIVATIONS] for p in _run(sampler, list(trained.values()), (64, 64), asked)}
    assert predicted.keys() == counted.keys() | {"update"}
    for phase, size in counted.items():
        assert predicted[phase] == pytest.approx(size, rel=0.02), phase


def test_what_is_not_predicted() -> None:
    build = planned_build("nf4", None)
    with pytest.raises(FinetuneError, match="give the config a lora"):
        predict_finetune(build, target(512), config(lora=None))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "side", "tokens"),
    [("nf4", 512, 4096), ("nf4", 1024, 8324), ("fp8-24gb", 512, 4096), ("ecq-24gb", 512, 4096), ("raw", 512, 4096)],
)
def test_the_docs_show_what_is_predicted(recipe: str, side: int, tokens: int) -> None:
    report = predict_finetune(planned_build(recipe, None), target(side), config(tokens=tokens))
    label = "bf16" if recipe == "raw" else f"`{recipe}`"
    row = re.search(rf"^\| {label} \| {side} \|(.+)\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None
    shown = [float(cell) for cell in row[1].split("|")]
    assert shown == [round(p.total / 2**30, 2) for p in report.phases]
    assert (report.broken == []) == (report.peak <= target(side).limit)
