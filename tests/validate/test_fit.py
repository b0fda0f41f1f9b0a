"""fit: the recipe with the largest rate that a GPU holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bagel_compress.budgets.fake_model import BuildOutline, scratch_bytes
from bagel_compress.budgets.fit import STEP, Fitted, expected_error, fit, table, with_rate
from bagel_compress.budgets.plan_devices import held_bytes
from bagel_compress.budgets.planned_build import checkpoint_sizes
from bagel_compress.budgets.predict import predict
from bagel_compress.build.allocate import shares_of_cost
from bagel_compress.build.plan import make_plan
from bagel_compress.build.rates import STEP as RATE_STEP
from bagel_compress.build.rates import water_filled
from bagel_compress.build.recipe import Recipe
from bagel_compress.build.sensitivity import GROUPS, Effect, Group
from bagel_compress.cli import main
from bagel_compress.codecs.ecq import Ecq
from bagel_compress.codecs.ecq.layout import MIN_BITS
from bagel_compress.errors import TargetError
from bagel_compress.io.packaged import find_recipe
from bagel_compress.run.target import Target
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.released_header import TrueHeader

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "golden" / "checkpoint"
TINY_TARGET = ROOT / "tests" / "data" / "tiny-target.yaml"


@pytest.fixture(scope="module")
def family() -> Recipe:
    return Recipe.load(find_recipe("ecq-12gb"))


def tiny_fit(family: Recipe, mib: float, **asked: object) -> Fitted:
    """The tiny checkpoint on its target with `mib` MiB to use."""
    target = Target.load(TINY_TARGET)
    target = target.model_copy(update={"budget": target.budget.model_copy(update={"peak_gib": mib / 1024})})
    checkpoint = Checkpoint.open(str(TINY))
    folder, vae = checkpoint_sizes(checkpoint)
    return fit(family, checkpoint, target, folder=folder, vae=vae, **asked)  # type: ignore[arg-type]


def test_the_rate_is_the_largest_that_fits(family: Recipe) -> None:
    ample = tiny_fit(family, 4096)
    assert ample.bits == 8.5
    lean = tiny_fit(family, 4096, disk_gb=ample.nbytes * 0.9 / 1e9)
    assert MIN_BITS <= lean.bits < 8.5
    assert lean.nbytes <= ample.nbytes * 0.9
    more = with_rate(family, round(lean.bits + 0.1, 2), lean.target)
    again = tiny_fit(more, 4096, disk_gb=ample.nbytes * 0.9 / 1e9)
    assert abs(again.bits - lean.bits) <= 3 * STEP  # wherever the search starts


def test_a_gpu_that_is_too_small_is_refused_with_the_least_it_would_need(family: Recipe) -> None:
    with pytest.raises(TargetError, match=r"even 1\.50 bits need .* GiB"):
        tiny_fit(family, 1)


def test_the_recipe_that_is_written_is_the_one_that_was_found(family: Recipe) -> None:
    found = tiny_fit(family, 4096)
    assert Recipe.parse(found.to_yaml(), "written").digest == found.recipe.digest
    assert "# Predicted peak" in found.to_yaml()


def test_distances_between_rates_are_kept(family: Recipe) -> None:
    text = "name: two\nrules:\n  - match: {expert: gen, kind: linear}\n    codec: {format: ecq, bits: 4.5}\n"
    text += (
        "  - match: {component: llm, kind: linear}\n    codec: {format: ecq, bits: 4}\n  - match: {}\n    codec: raw\n"
    )
    moved = with_rate(Recipe.parse(text, "two"), 3.5, Target.load("12gb"))
    assert [getattr(rule.codec, "bits", None) for rule in moved.rules] == [3.5, 3.0, None]


def test_a_recipe_without_rates_is_refused() -> None:
    with pytest.raises(TargetError, match="has no format with a rate"):
        fit(Recipe.load(find_recipe("nf4-nearest")), TrueHeader(), Target.load("12gb"))


def test_the_expected_error_is_that_of_the_formula() -> None:
    assert expected_error(4.13) == pytest.approx(0.0681, abs=1e-4)  # spec: 0.0683 measured on normal weights at 4.127


def test_the_verb_writes_a_recipe_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "there" / "mine.yaml"
    assert main(["fit", "--target", str(TINY_TARGET), "--source", str(TINY), "--out", str(out)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["fit", "--target", str(TINY_TARGET), "--gib", "1000", "--source", str(TINY)]) == 2
    assert "give at most that" in capsys.readouterr().err
    out = tmp_path / "mine.yaml"
    assert main(["fit", "--target", str(TINY_TARGET), "--source", str(TINY), "--out", str(out)]) == 0
    assert Recipe.load(out).rules[0].codec.format == "ecq"


def test_bits_go_where_they_are_worth_most_and_their_mean_is_kept() -> None:
    """Against small moves: no pair of groups gains by trading bits; ends of the rates hold."""
    rng = np.random.default_rng(0)
    groups = [Group(layer, expert, name) for layer in range(6) for expert in ("und", "gen") for name in GROUPS]
    effects = {g: Effect(float(rng.lognormal(-8, 2)), float(rng.lognormal(-9, 2)), 0) for g in groups}
    weights = {g: int(rng.integers(1, 9)) * 1000 for g in groups}
    found = water_filled(effects, weights, 3.0, (1.5, 8.5))
    total = sum(weights.values())
    assert 3.0 - 0.06 < sum(found[g] * weights[g] for g in groups) / total <= 3.0 + 1e-6
    assert all(1.5 <= bits <= 8.5 for bits in found.values())
    costs = {group: cost for group, (cost,) in shares_of_cost({g: (e,) for g, e in effects.items()}).items()}
    worth = {g: costs[g] * 4.0 ** -found[g] / weights[g] for g in groups}  # of a bit, apart from a constant
    inside = [worth[g] for g in groups if 1.5 < found[g] < 8.4]
    assert max(inside) / min(inside) < 4.0 ** (2 * RATE_STEP)
    assert all(worth[g] <= max(inside) for g in groups if found[g] == 1.5)
    assert len({round(bits, 2) for bits in found.values()}) > 10


def test_measured_weights_get_rates_of_their_own(tmp_path: Path) -> None:
    out, calibration = tmp_path / "mine.yaml", ROOT / "bagel_compress" / "data" / "calibration" / "tiny.safetensors"
    asked = ["fit", "--target", str(TINY_TARGET), "--disk-gb", "0.00045", "--calibration", str(calibration)]
    assert main([*asked, "--out", str(out)]) == 2  # nothing to measure
    assert main([*asked, "--source", str(TINY), "--out", str(out)]) == 0
    recipe, checkpoint = Recipe.load(out), Checkpoint.open(str(TINY))
    plan = make_plan(checkpoint, recipe)
    assert plan.nbytes <= 450_000
    rates = {p.codec.bits for p in plan.placements if isinstance(p.codec, Ecq) and p.calibrated}
    assert len(rates) > 4
    text = out.read_text(encoding="utf-8")
    assert "# Rates by sensitivity, measured on" in text
    assert "und down_proj" in text


def test_a_coded_table_is_counted_as_it_is_stored_and_formats_share_one_ring() -> None:
    checkpoint = Checkpoint.open(str(TINY))
    folder, vae = checkpoint_sizes(checkpoint)

    def outline(und: str, table: str) -> BuildOutline:
        rules = f"""name: x
rules:
  - {{match: {{component: llm, kind: linear, expert: und}}, codec: {und}}}
  - {{match: {{component: llm, kind: linear, expert: gen}}, codec: {{format: ecq, bits: 4}}}}
  - {{match: {{component: llm, kind: embedding}}, codec: {table}}}
  - {{match: {{}}, codec: raw}}"""
        return BuildOutline.of_plan(make_plan(checkpoint, Recipe.parse(rules, "x")), folder, vae)

    plain, coded = outline("df11", "raw"), outline("df11", "{format: ecq, bits: 4}")
    [table] = [unit for unit in coded.units if "embed_tokens" in unit.unit.name]
    saved = held_bytes(plain)["embed_tokens"] - held_bytes(coded)["embed_tokens"]
    assert 2 * table.unit.numel - table.nbytes - 4096 < saved < 2 * table.unit.numel - table.nbytes + 4096
    target = Target.load(TINY_TARGET)
    assert predict(plain, target).peak - predict(coded, target).peak == pytest.approx(saved, abs=4096)
    alone = outline("{format: ecq, bits: 4}", "raw")
    largest = [max(s.unit.numel for s in b.units if s.codec.format == f) for b, f in ((plain, "df11"), (alone, "ecq"))]
    assert 2 * largest[0] <= scratch_bytes(plain) < 2 * (2 * largest[0] + 64) + 1  # df11's units are the larger ones
    assert scratch_bytes(alone) < scratch_bytes(plain)


@pytest.mark.parametrize(("bits", "level"), [(1.5, "4-bit"), (5.49, "4-bit"), (5.5, "8-bit"), (8.5, "8-bit")])
def test_a_rate_has_the_class_of_its_error(family: Recipe, bits: float, level: str) -> None:
    """5.5 bits are the first whose normal weights come back no worse than FP8's 0.0265."""
    recipe = with_rate(family, bits, Target.load("12gb"))
    assert recipe.limits.level == level
    assert (recipe.name, recipe.targets, recipe.budget_gb) == ("ecq-12gb", ("12gb",), None)
    assert f"at {bits:.2f} bits, the most that NVIDIA GeForce RTX 3060 12GB holds" in recipe.summary
    own = with_rate(family, bits, Target.load(TINY_TARGET), "mine")
    assert (own.name, own.targets) == ("mine", ())  # a promise of a target that nobody else has says nothing


def test_a_few_predictions_find_the_rate(family: Recipe) -> None:
    """Peaks are close to a line in the rate: the secant meets them at once, where halving would take eight."""
    said: list[str] = []
    disk = tiny_fit(family, 4096).nbytes * 0.9 / 1e9
    found = tiny_fit(family, 4096, disk_gb=disk, say=said.append)
    assert len(said) <= 5
    assert said[-1].startswith(f"{found.bits:.2f} bits: peak")
    assert 0 <= 1 - found.nbytes / (disk * 1e9) <= 0.01


def test_the_table_of_rates() -> None:
    report = SimpleNamespace(peak=10.5 * 2**30)
    fitted = Fitted(None, 4.125, report, Target.load("12gb"), 7_654_321_000)  # type: ignore[arg-type]
    limit = Target.load("12gb").limit
    head, row = table([fitted]).split("\n")
    assert head.split() == ["target", "bits", "peak", "GiB", "limit", "GiB", "free", "MiB", "disk"]
    assert row.split() == [
        "12gb", "4.12", "10.500", f"{limit / 2**30:.3f}", f"{(limit - 10.5 * 2**30) / 2**20:.0f}", "7.654", "GB",
    ]  # fmt: skip
