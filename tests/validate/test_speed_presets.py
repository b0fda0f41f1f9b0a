"""Presets of a recipe are held to its limits, and the price list chooses those that hold them."""

import json
from dataclasses import replace

import pytest
from tiny_suite import CASES, PICTURES, TINY

from bagel.settings import FlowSettings
from bagel_compress.build.compress import compress
from bagel_compress.build.limits import resolve
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.build.speed_settings import SpeedPreset
from bagel_compress.cli import main
from bagel_compress.errors import RecipeError, TraceError
from bagel_compress.parity.compare import Candidate, compare
from bagel_compress.publishing.card_sections import presets_section
from bagel_compress.scores.benchmark import Benchmark, Prompt
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.validation.artifact import record_source
from bagel_compress.validation.price_list import PriceList, price_list, with_scores

RECIPE = "name: a\nrules: [{match: {}, codec: raw}]\n"


def test_a_preset_is_drawn_and_may_break_the_gate(reference, trace_file):
    presets = {"exact": SpeedPreset(), "fast": SpeedPreset(num_timesteps=3)}
    subject = Candidate(reference, "x", "0", "8-bit", resolve("8-bit", {}), presets=presets)
    report = compare(subject, [trace_file]).report
    exact = [row for row in report.rows if row.case.endswith("preset exact")]
    fast = [row for row in report.rows if row.case.endswith("preset fast")]
    assert all(row.ok for row in exact)
    assert {row.value for row in exact if row.metric == "latent.path"} == {0.0}
    assert not all(row.ok for row in fast)
    assert not report.passed
    assert any("preset fast" in reason and "Take fast out of the recipe's `fast`" in reason for reason in report.broken)
    recipe = Recipe.parse(RECIPE + "fast: {exact: {}, fast: {num_timesteps: 3}}", "r")
    section = presets_section(recipe, report)
    assert "| `exact` | official sampler | 0 (0.08) | equal (27) |" in section
    assert "| `fast` | 3 points |" in section
    assert presets_section(Recipe.parse(RECIPE, "r"), report) == presets_section(None, report) == ""


def test_presets_of_a_recipe():
    recipe = Recipe.parse(RECIPE + "fast: {balanced: {cache_every: 2}}", "r")
    assert recipe.fast == {"balanced": SpeedPreset(cache_every=2)}
    assert recipe.digest != Recipe.parse(RECIPE, "r").digest
    assert "fast" not in Recipe.parse(RECIPE, "r").model_dump()
    for text, what in (("{quick: {}}", "fast.quick"), ("{fast: {solver: heun, cache_every: 2}}", "heun")):
        with pytest.raises(RecipeError, match=what):
            Recipe.parse(RECIPE + f"fast: {text}", "r")


def test_the_price_list_of_a_checkpoint(tmp_path, capsys):
    trace = tmp_path / "t.safetensors"
    record_source(TINY, [(CASES[0], PICTURES)], trace, floors=())
    out = tmp_path / "speed"
    assert main(["speed", str(TINY), "--trace", str(trace), "--out", str(out), "--class", "4-bit"]) == 0
    assert "presets for the recipe:\nfast:\n  exact: {}" in capsys.readouterr().out
    found = PriceList.model_validate(json.loads((out / "speed.json").read_text()))
    prices = {price.name: price for price in found.prices}
    official, half = prices["official sampler"], prices["cache_every 2, cache_order 1"]
    assert (official.latent, official.passes, official.broken) == (0.0, 10.0, ())
    assert half.passes == 6.0
    assert half.latent > 0
    for preset in found.presets.values():
        assert prices[str(preset)].broken == ()
    assert (out / "speed.svg").read_text().startswith("<svg ")


def test_the_price_list_says_how_scores_move(reference, trace_file):
    """The scorer calls a picture right if it is the official sampler's, so every setting that changes one loses."""
    setting, kept = SpeedPreset(num_timesteps=3), FlowSettings(num_timesteps=9)
    prompts = tuple(Prompt("draw", (text,), size=(32, 32)) for text in ("a cat", "a red car"))
    wanted = {p.turns: reference.run(p.turns, size=(32, 32), flow=kept, seed=i).image for i, p in enumerate(prompts)}

    def score(prompt, answer):
        return {"same": float(answer.image.tobytes() == wanted[prompt.turns].tobytes())}

    asked = (*prompts, Prompt("ask", ("what is it?",), output="text"))  # a text, which no setting touches
    benchmark = Benchmark("own", asked, score, {"": kept})
    listed = price_list(reference, "m", [trace_file.read(CASES[0].name)], {}, (SpeedPreset(), setting))
    found = with_scores(listed, reference, benchmark)
    official, fewer = (price.scores["same"] for price in found.prices)
    assert (official.prompts, official.delta) == (2, 0.0)
    assert (fewer.delta, fewer.low, fewer.high) == (-100.0, -100.0, -100.0)
    with pytest.raises(TraceError, match="no prompt for a picture"):
        with_scores(listed, reference, replace(benchmark, prompts=asked[2:]))


def test_a_picture_is_drawn_with_the_preset_of_a_build(tmp_path, capsys):
    recipe = Recipe.parse(RECIPE + "fast: {balanced: {cache_every: 2}}", "r")
    artifact = compress(make_plan(Checkpoint.open(TINY), recipe), Checkpoint.open(TINY), tmp_path / "a")

    def drawn(*options):
        out = tmp_path / "p.png"
        argv = [
            "generate",
            str(artifact.path),
            "a cat",
            "--size",
            "32x32",
            "--steps",
            "9",
            "--out",
            str(out),
            "--force",
            *options,
        ]
        return main(argv), out.read_bytes() if out.exists() else b""

    assert drawn("--preset", "balanced") == drawn("--cache-every", "2") != drawn()
    assert drawn("--preset", "exact", "--cache-every", "2") == drawn()
    assert drawn("--step-runtime", "static") == drawn()
    assert drawn("--preset", "fast")[0] == 2
    assert "its presets: exact, balanced" in capsys.readouterr().err
