"""Scores: batches equal single runs, differences are paired, and a damaged answer is counted as wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bagel.sampler import Sampler
from bagel.settings import FlowSettings, TextSettings
from bagel_compress.errors import TraceError
from bagel_compress.scores.benchmark import Answer, Benchmark, Prompt, Scores, ask, compare, run, same_answers
from bagel_compress.scores.nano import nano_benchmark, score

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "checkpoint"


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler.from_dir(CHECKPOINT, dtype=torch.float32)


def test_a_batch_gives_what_single_runs_give(sampler: Sampler) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    prompts = (
        Prompt("draw", ("a red cat",), size=(32, 32)),
        Prompt("draw", ("the old house and the moon",), size=(32, 32)),
        Prompt("ask", (picture, "what is this?"), output="text"),
        Prompt("edit", (picture, "make it red")),
        Prompt("edit", (picture, "remove the old cat")),
        Prompt("think", ("a moon",), think=True, size=(32, 32)),
    )
    flow = FlowSettings(num_timesteps=4, cfg_img_scale=1.5, cfg_interval=(0.0, 1.0), cfg_renorm_type="channel")
    benchmark = Benchmark("mine", prompts, lambda p, a: {p.kind: 1.0}, {"": flow}, TextSettings(max_tokens=6), seed=3)
    scores = run(benchmark, sampler, batch=4)
    for index, found in enumerate(scores.answers):
        [alone] = ask(benchmark, sampler, [index])
        assert found.text == alone.text
        if alone.image is not None:
            difference = np.abs(np.asarray(found.image, int) - np.asarray(alone.image, int))
            assert difference.max() <= 1  # rounding of another batch size


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random(200) < 0.5).astype(float)
    worse = base.copy()
    worse[np.flatnonzero(base)[:20]] = 0
    answers = tuple(Answer(text=str(v)) for v in base)
    reference = Scores("b", {"x": dict(enumerate(base))}, answers)
    candidate = Scores("b", {"x": dict(enumerate(worse))}, answers)
    [found] = compare(candidate, reference)
    assert found.prompts == 200
    assert found.delta == pytest.approx(-0.1)
    assert found.low < -0.1 < found.high < 0
    [none] = compare(reference, reference)
    assert (none.low, none.high) == (0.0, 0.0)
    assert same_answers(reference, reference) == 1.0


def test_other_prompts_are_not_compared() -> None:
    with pytest.raises(TraceError, match="same benchmark"):
        compare(Scores("a", {}, ()), Scores("b", {}, ()))


def test_nano_prompts_are_balanced_and_repeat() -> None:
    benchmark = nano_benchmark()
    assert len(benchmark.prompts) >= 500
    again = nano_benchmark()
    assert [p.turns[-1] for p in benchmark.prompts] == [p.turns[-1] for p in again.prompts]
    kinds = [p.kind for p in benchmark.prompts]
    assert kinds.count("draw.one") == kinds.count("draw.two") == 120
    assert kinds.count("ask.relation") == 24


def test_nano_scorer_tells_right_from_wrong() -> None:
    from bagel.nano.scenes import render, sample_scene

    benchmark = nano_benchmark(draw=8, ask=0, edit=0, think=0)
    rng = np.random.default_rng(benchmark.seed)
    for prompt in benchmark.prompts:
        scene = sample_scene(rng, 1 if prompt.kind == "draw.one" else 2)
        rng.random() if prompt.kind == "draw.two" else None  # the caption's draw
        right = score(prompt, Answer(image=Image.fromarray(render(scene))))
        assert set(right.values()) == {1.0}
        blank = score(prompt, Answer(image=Image.new("RGB", (32, 32), (0, 0, 255))))
        assert blank["draw.count"] == blank[prompt.kind.partition(".")[2]] == 0.0
