"""A pass is split into its parts, and its floor are its own products and attention."""

import json

import pytest
from tiny_suite import TINY

from bagel_compress.budgets.step_profile import _pass, _StepRecorder, profile_step
from bagel_compress.cli import main


def test_the_floor_is_every_product_and_attention_of_a_pass(reference):
    run = _pass(reference, (32, 32), "a cat")
    with _StepRecorder() as recorder:
        run()
    layers = reference.bagel.config.llm.num_layers
    names = [function.__name__ for function, _, _ in recorder.calls]
    assert names.count("scaled_dot_product_attention") == layers
    # both experts have seven products a layer; in the last one the wrapper rows need keys and values alone; and the
    # time embedder's two, vae2llm and llm2vae
    assert names.count("linear") == 14 * layers - 5 + 4


def test_the_verb_says_where_the_time_goes(reference, capsys):
    found = profile_step(reference, (32, 32), repeats=3)
    assert found.ratio > 1
    assert sum(found.shares.values()) == pytest.approx(1)
    assert {"norms", "attention", "products: down"} <= found.shares.keys()
    assert main(["profile", str(TINY), "--size", "32x32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["floor"] > 0
