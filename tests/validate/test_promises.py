"""What the shipped recipes promise: the targets in `targets:` hold the released checkpoint's build, by prediction."""

import pytest

from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import resource
from bagel_compress.run.target import Target
from bagel_compress.validation.check import budgets_of

RECIPES = sorted(path.stem for path in resource("recipes").glob("*.yaml"))
NARROW = ("mixed-12gb", "mixed-24gb")  # under half a GiB to spare: checked in every run, the others with `-m slow`


def promised(recipe: str) -> tuple[str, ...]:
    return Recipe.load(resource("recipes") / f"{recipe}.yaml").targets


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_promises_targets_that_are_there(recipe):
    assert promised(recipe)
    assert [Target.load(target).name for target in promised(recipe)] == list(promised(recipe))


@pytest.mark.parametrize(
    "recipe", [name if name in NARROW else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_the_promises_hold(recipe):
    for report in budgets_of(recipe, promised(recipe)):
        assert report.broken == []
        assert 0 < report.peak <= report.limit


def test_a_promise_that_does_not_hold_would_be_seen():
    [report] = budgets_of("nf4-12gb", ["12gb"])  # all at once, with the VAE on the card: 13.5 GiB
    assert "12gb: edit: vae decode needs" in report.broken[0]
    assert report.advice[-1].endswith("give --target 12gb-resident.")
