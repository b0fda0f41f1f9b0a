"""A pass is split into its parts, and its floor are its own products and attention."""

import json

import pytest
import torch
from tiny_suite import TINY

from bagel_compress.budgets.pass_profile import _PASSES, _CallRecorder, _read, profile_pass
from bagel_compress.cli import main


def names(sampler, kind):
    run = _PASSES[kind](sampler, (32, 32), "a cat")
    with torch.no_grad(), _CallRecorder() as recorder:
        run()
    return [function.__name__ for function, _, _ in recorder.calls]


def test_the_floor_is_every_product_and_attention_of_a_pass(reference):
    layers = reference.bagel.config.llm.num_layers
    found = names(reference, "step")
    assert found.count("scaled_dot_product_attention") == layers
    # both experts have seven products a layer; in the last one the wrapper rows need keys and values alone; and the
    # time embedder's two, vae2llm and llm2vae
    assert found.count("linear") == 14 * layers - 5 + 4


def test_a_token_reads_every_weight_of_one_expert_and_the_head(reference):
    run = _PASSES["token"](reference, (32, 32), "a cat")
    length = reference.bagel.config.llm.num_layers
    with torch.no_grad(), _CallRecorder() as recorder:
        run()
    weights = [args[1] for function, args, _ in recorder.calls if function.__name__ == "linear"]
    expert = [p for n, p in reference.bagel.named_parameters() if ".und." in n and n.endswith("proj.weight")]
    assert {w.data_ptr() for w in weights} == {p.data_ptr() for p in [*expert, reference.bagel.lm_head.weight]}
    assert len(weights) == 7 * length + 1
    for weight in weights[:3]:
        words = weight.detach().reshape(-1).view(torch.float32)
        assert torch.equal(_read(weight), words.sum()) or bool(words.isnan().any())


def test_a_prefill_reads_a_picture_twice_and_a_prompt(reference):
    config = reference.bagel.config
    found = names(reference, "prefill")
    # each of the three passes leaves out the last layer's attention, whose rows nobody reads
    assert found.count("scaled_dot_product_attention") == 3 * (config.llm.num_layers - 1) + config.vit.num_layers


def test_the_verb_says_where_the_time_goes(reference, capsys):
    found = profile_pass(reference, "step", (32, 32), repeats=3)
    assert found.ratio > 1
    assert found.reading == 0
    assert sum(found.shares.values()) == pytest.approx(1)
    assert {"norms", "attention", "products: down"} <= found.shares.keys()
    assert main(["profile", str(TINY), "--size", "32x32", "--pass", "token", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["floor"] > 0
    assert report["reading"] > 0
    assert main(["profile", str(TINY), "--size", "32x32", "--pass", "prefill"]) == 0
    assert "s a prefill" in capsys.readouterr().out
