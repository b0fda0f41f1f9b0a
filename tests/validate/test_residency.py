"""Residency: the same bits, less on the card, and nothing used that is not there."""

import copy

import pytest
import torch
from PIL import Image
from tiny_suite import PICTURES

from bagel.flow import FlowSettings
from bagel.sampler import Sampler, TextSettings
from bagel_compress.run.offload import place, reside
from bagel_compress.run.target import NEEDED, Device, Target

FLOW = FlowSettings(num_timesteps=4, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0))
NOTHING = {}
NEEDED_ONLY = dict(NEEDED)


def run_all(sampler):
    """A thoughtful edit and an answer: every phase."""
    picture = Image.open(PICTURES / "pictures/house.png").convert("RGB")
    text = TextSettings(max_tokens=5)
    edited = sampler.run([picture, "make it night"], think=True, flow=FLOW, text=text, seed=1)
    answer = sampler.run([picture, "what is this?"], output="text", text=text)
    return edited.text, edited.latent, edited.image.tobytes(), answer.ids


def own(reference):
    return Sampler(copy.deepcopy(reference.bagel), copy.deepcopy(reference.vae), reference.text)


@pytest.fixture(scope="module")
def plain(reference):
    return run_all(own(reference))


@pytest.mark.parametrize("plan", [NOTHING, NEEDED_ONLY], ids=["streamed", "by phase"])
def test_a_plan_changes_no_bit(reference, plain, plan):
    sampler = own(reference)
    residency = reside(sampler, plan, "cpu")
    found = run_all(sampler)
    assert torch.equal(found[1], plain[1])
    assert (found[0], found[2], found[3]) == (plain[0], plain[2], plain[3])
    assert 0 < residency.peak < sum(p.nbytes for m in (reference.bagel, reference.vae) for p in m.parameters())


def test_less_is_on_the_card_the_less_a_plan_lists(reference):
    everything = dict.fromkeys(NEEDED, ("und", "gen", "embed", "head", "vit", "vae"))
    found = []
    for plan in (NOTHING, NEEDED_ONLY, everything):
        residency = reside(own(reference), plan, "cpu")
        residency.enter("denoise")
        found.append(residency.bytes_there)
    assert 0 == found[0] < found[1] < found[2]


def test_what_waits_in_host_memory_cannot_be_used_by_mistake(reference):
    sampler = own(reference)
    residency = reside(sampler, NEEDED_ONLY, "cpu")
    residency.enter("vae_decode")
    assert sampler.bagel.layers[0].gen.q_proj.weight.is_meta
    assert not next(sampler.vae.parameters()).is_meta
    residency.enter("denoise")
    assert not sampler.bagel.layers[0].gen.q_proj.weight.is_meta
    assert next(sampler.vae.parameters()).is_meta
    assert sampler.bagel.lm_head.weight.is_meta


def test_coded_weights_move_as_they_are_stored(reference, plain):
    from bagel_compress.codecs.base import Unit, dtype_code
    from bagel_compress.codecs.fp8 import Fp8
    from bagel_compress.io.tensor_spec import TensorSpec

    sampler, beside = own(reference), own(reference)
    for each in (sampler, beside):
        for layer in each.bagel.layers:
            linear = layer.gen.down_proj
            spec = TensorSpec(dtype_code(linear.weight.dtype), tuple(linear.weight.shape), "w")
            codec = Fp8.model_validate({"format": "fp8"})
            parts = codec.encode(Unit("w", (spec,)), {"w": linear.weight.data})
            layer.gen.down_proj = codec.linear(spec, parts, None)
    reside(sampler, NEEDED_ONLY, "cpu")
    assert sampler.bagel.layers[1].gen.down_proj.codes.is_meta
    assert torch.equal(run_all(sampler)[1], run_all(beside)[1])


def test_a_target_places_a_model(reference, plain):
    card = Device(name="x", memory_mib=1)
    host = own(reference)
    assert place(host, Target(name="a", device=card, vae_on_host=True), "cpu") is None
    assert torch.equal(run_all(host)[1], plain[1])
    moved = own(reference)
    assert place(moved, Target(name="b", device=card, residency=NEEDED_ONLY), "cpu") is not None
    assert torch.equal(run_all(moved)[1], plain[1])
