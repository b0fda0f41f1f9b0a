"""`rounding` in recipes: one word or a mapping, errors that say what was meant, digests that stay what they were."""

import pytest

from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs.calibrated import Gptq
from bagel_compress.errors import RecipeError

# Digest of this recipe under the version that knew no `rounding`.
UNCALIBRATED = """
name: fixed
rules:
  - {match: {component: llm, kind: linear}, codec: {format: nf4, double_quant: true}}
  - {match: {component: vit, kind: linear}, codec: {format: fp8, scale: mse}}
  - {match: {kind: head}, codec: int8}
  - {match: {component: latent}, codec: int4}
  - {match: {}, codec: raw}
"""
DIGEST = "f0d22c7150be69f25f60bdd6272171a5649327c076bf0d3645d2e80bcb96771b"


def recipe(codec: str) -> Recipe:
    return Recipe.parse(f"name: x\nrules: [{{match: {{}}, codec: {codec}}}]", "f.yaml")


def test_recipes_that_name_no_rounding_keep_their_digest() -> None:
    assert Recipe.parse(UNCALIBRATED, "fixed").digest == DIGEST
    assert recipe("{format: nf4, rounding: nearest}").digest == recipe("nf4").digest
    assert recipe("{format: nf4, rounding: gptq}").digest != recipe("nf4").digest


def test_one_word_is_all_defaults() -> None:
    assert recipe("{format: nf4, rounding: gptq}") == recipe("{format: nf4, rounding: {method: gptq}}")
    assert recipe("{format: int4, rounding: {method: gptq, passes: 1}}").rules[0].codec.rounding == Gptq(passes=1)  # type: ignore[attr-defined]


def test_a_calibrated_recipe_survives_json_and_says_every_value() -> None:
    one = recipe("{format: nf4, rounding: gptq}")
    assert Recipe.model_validate_json(one.model_dump_json()) == one
    written = one.model_dump(mode="json")["rules"][0]["codec"]["rounding"]
    assert written == {"method": "gptq", "act_order": True, "damping": 0.01, "passes": 2, "refit": False}


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        ("{format: nf4, rounding: gptqq}", "unknown rounding 'gptqq'; roundings are nearest, gptq"),
        ("{format: nf4, rounding: {method: gptq, pases: 2}}", r"unknown key 'pases' \(did you mean passes\?\)"),
        ("{format: nf4, rounding: {passes: 2}}", "expected nearest, gptq or a mapping with `method`"),
        ("{format: nf4, rounding: {method: gptq, damping: 0}}", "damping: input should be greater than 0, found 0"),
        ("{format: df11, rounding: gptq}", "unknown key 'rounding'; keys here are format, units"),
    ],
)
def test_errors_say_what_was_meant(codec: str, says: str) -> None:
    with pytest.raises(RecipeError, match=rf"f\.yaml rule 1.*{says}"):
        recipe(codec)
