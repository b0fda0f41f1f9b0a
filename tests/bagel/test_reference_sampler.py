"""The sampler's own promises: savings change nothing, contexts fork freely, seeds repeat, bad settings are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image
from torch import Tensor

from bagel.errors import BagelError
from bagel.flow import FlowSettings
from bagel.inputs import THINK_IMAGE
from bagel.layers import attention_kernel
from bagel.sampler import EDIT_FLOW, Request, Sampler, TextSettings

FLOW = FlowSettings(num_timesteps=4)
EDIT = FlowSettings(num_timesteps=3, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel")
PICTURE = Image.effect_mandelbrot((80, 64), (-2.0, -1.5, 1.0, 1.5), 50).convert("RGB")


def rel(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def plain_copy(sampler: Sampler) -> Sampler:
    """The sampler with nothing skipped and nothing shared."""
    twin = copy.copy(sampler)
    twin.share_branches = False
    twin.bagel = copy.copy(sampler.bagel)
    twin.bagel.skip_unused = False
    return twin


@pytest.mark.parametrize(
    ("turns", "flow", "think"),
    [
        (["a red cat"], FLOW, False),
        (["a red cat"], FlowSettings(num_timesteps=4, cfg_img_scale=1.5), False),
        (["a red cat"], FlowSettings(num_timesteps=4, cfg_img_scale=1.5), True),
        ([PICTURE, "make it night"], EDIT, False),
        (["make it night", PICTURE], EDIT, False),
        ([PICTURE, "and", PICTURE, "make it night"], EDIT, True),
        ([PICTURE, "make it night"], FlowSettings(num_timesteps=3, cfg_text_scale=1.0, cfg_img_scale=2.0), False),
    ],
)
def test_savings_change_nothing(fp32: Sampler, turns: list, flow: FlowSettings, think: bool) -> None:
    """Shared branches and skipped rows against filling and evaluating everything the official code does."""
    text = TextSettings(max_tokens=5)
    saved, full = (
        sampler.run(turns, flow=flow, think=think, size=(64, 48), text=text, seed=3).latent
        for sampler in (fp32, plain_copy(fp32))
    )
    assert saved is not None
    assert full is not None
    assert rel(saved, full) < 1e-5


def test_t2i_evaluates_two_branches_not_three(fp32: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    inner = fp32.bagel.velocity
    monkeypatch.setattr(fp32.bagel, "velocity", lambda *a, **k: calls.append(1) or inner(*a, **k), raising=False)
    fp32.run(
        ["a red cat"], flow=FlowSettings(num_timesteps=4, cfg_img_scale=1.5, cfg_interval=(0.0, 1.0)), size=(32, 32)
    )
    assert len(calls) == 2 * 3


@pytest.mark.parametrize("turns", [["a red cat"], [PICTURE, "make it night"]])
def test_merged_branches_agree(fp32: Sampler, turns: list) -> None:
    merged = copy.copy(fp32)
    merged.merge_branches = True
    a = fp32.run(turns, flow=EDIT, size=(48, 64), seed=1).latent
    b = merged.run(turns, flow=EDIT, size=(48, 64), seed=1).latent
    assert a is not None
    assert b is not None
    assert rel(b, a) < 1e-5


def test_exact_kernel_agrees(fp32: Sampler) -> None:
    a = fp32.run([PICTURE, "make it night"], flow=EDIT, seed=1).latent
    with attention_kernel("exact"):
        b = fp32.run([PICTURE, "make it night"], flow=EDIT, seed=1).latent
    assert a is not None
    assert b is not None
    assert 0 < rel(b, a) < 1e-5


def test_batch_equals_single_samples(fp32: Sampler) -> None:
    """Without renormalisation over the batch, samples of different sizes and prompts do not see each other."""
    flow, text = FlowSettings(num_timesteps=3, cfg_renorm_type="channel"), TextSettings(max_tokens=6)
    requests = [Request(["a red cat"], (32, 48), seed=1), Request(["night over the old house"], (64, 32), seed=2)]
    together = fp32.run_batch(requests, flow=flow, text=text, think=True)
    for request, found in zip(requests, together, strict=True):
        [alone] = fp32.run_batch([request], flow=flow, text=text, think=True)
        assert found.ids == alone.ids
        assert found.image is not None
        assert found.image.size == (request.size[1], request.size[0])
        assert rel(found.latent, alone.latent) < 1e-5


def test_pictures_of_a_batch_have_their_own_sizes_and_noise(fp32: Sampler) -> None:
    wide = PICTURE.resize((96, 48))
    requests = [Request([picture, "make it night"], seed=seed) for seed, picture in ((4, PICTURE), (5, wide))]
    flow = FlowSettings(num_timesteps=3, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel")
    for request, found in zip(requests, fp32.run_batch(requests, flow=flow), strict=True):
        alone = fp32.run(request.turns, flow=flow, seed=request.seed)
        assert found.image.size == alone.image.size
        assert rel(found.latent, alone.latent) < 1e-5


def test_sampled_text_of_a_batch_is_each_seed_s_own(fp32: Sampler) -> None:
    hot = TextSettings(max_tokens=8, do_sample=True, temperature=2.0)
    requests = [Request(["a cat"], seed=seed) for seed in (1, 2, 1)]
    together = [result.ids for result in fp32.run_batch(requests, output="text", text=hot)]
    assert together[0] == together[2] != together[1]
    assert together[1] == fp32.run(["a cat"], output="text", text=hot, seed=2).ids


def test_a_batch_of_different_layouts_is_refused(fp32: Sampler) -> None:
    with pytest.raises(BagelError, match="2 orders of texts and pictures, expected 1"):
        fp32.run_batch([Request(["a cat"]), Request([PICTURE, "a cat"])])


def test_text_batch_equals_single_samples(fp32: Sampler) -> None:
    prompts = ["a red cat", "man why", "night over the old house"]
    settings = TextSettings(max_tokens=30)

    def context(prompt: str) -> list:
        contexts = [fp32.bagel.new_context()]
        fp32.bagel.prefill_text(contexts, [fp32.text.turn(prompt)])
        return contexts

    together = fp32.decode_text([context(p)[0] for p in prompts], settings)
    assert together == [fp32.decode_text(context(p), settings)[0] for p in prompts]
    assert len({len(ids) for ids in together}) > 1, "the samples should stop at different lengths"


def test_forks_share_and_do_not_disturb(fp32: Sampler) -> None:
    """Two forks that append different text give what separate contexts give, and the first append copies nothing."""
    model, turn = fp32.bagel, fp32.text.turn
    root = model.new_context()
    model.prefill_text([root], [turn("a red cat")])
    forks = [root.fork(), root.fork()]
    for fork, text in zip(forks, ("sits", "looks at the moon"), strict=True):
        model.prefill_text([fork], [turn(text)])
    for fork, text in zip(forks, ("sits", "looks at the moon"), strict=True):
        alone = model.new_context()
        model.prefill_text([alone], [turn("a red cat")])
        model.prefill_text([alone], [turn(text)])
        for layer in range(fork.layers):
            for mine, other in zip(fork.keys_values(layer), alone.keys_values(layer), strict=True):
                assert torch.equal(mine, other)
    storages = [c.keys_values(0)[0].untyped_storage().data_ptr() for c in (root, *forks)]
    assert storages[0] == storages[1] != storages[2]
    assert root.length == len(turn("a red cat"))


def test_many_tokens_outgrow_the_storage(fp32: Sampler) -> None:
    context = fp32.bagel.new_context()
    one = fp32.bagel.new_context()
    ids = [5 + i % 300 for i in range(600)]
    for part in (ids[:200], ids[200:201], ids[201:]):
        fp32.bagel.prefill_text([context], [part])
    fp32.bagel.prefill_text([one], [ids])
    assert context.length == one.length == 600
    assert rel(context.keys_values(2)[0], one.keys_values(2)[0]) < 1e-5


def test_seed_repeats_and_differs(bf16: Sampler) -> None:
    first, again, other = (bf16.run(["a cat"], flow=FLOW, size=(32, 32), seed=s).latent for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_text_is_seeded(fp32: Sampler) -> None:
    hot = TextSettings(max_tokens=12, do_sample=True, temperature=2.0)
    texts = [fp32.run(["a cat"], output="text", text=hot, seed=s).ids for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_nothing_global_is_touched(bf16: Sampler) -> None:
    before = torch.random.get_rng_state()
    bf16.run(["a cat"], flow=FLOW, size=(32, 32), seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


def test_empty_prompt_is_two_tokens(bf16: Sampler) -> None:
    assert bf16.text.turn("") == [bf16.text.bos, bf16.text.eos]
    assert bf16.run([""], flow=FLOW, size=(32, 32)).image is not None


def test_edit_takes_the_size_of_the_last_picture(bf16: Sampler) -> None:
    wide = PICTURE.resize((96, 48))
    image = bf16.run([PICTURE, wide, "mix"], flow=EDIT, size=(32, 32)).image
    assert image is not None
    assert image.size == (96, 48)


def test_think_prompt_is_verbatim() -> None:
    assert " \nThe planning process" in THINK_IMAGE
    assert EDIT_FLOW.cfg_renorm_type == "text_channel"


@pytest.mark.parametrize("size", [(65, 64), (64, 0), (64, 2048), (-16, 64)])
def test_impossible_sizes(bf16: Sampler, size: tuple[int, int]) -> None:
    with pytest.raises(BagelError, match="expected"):
        bf16.run(["a cat"], size=size)


@pytest.mark.parametrize(
    "settings",
    [{"cfg_renorm_type": "local"}, {"cfg_renorm_type": "x"}, {"num_timesteps": 1}, {"timestep_shift": 0.0}],
)
def test_impossible_flow_settings(settings: dict) -> None:
    with pytest.raises(BagelError, match="expected"):
        FlowSettings(**settings)


def test_impossible_text_settings() -> None:
    with pytest.raises(BagelError, match="expected"):
        TextSettings(max_tokens=0)
    with pytest.raises(BagelError, match="temperature"):
        TextSettings(do_sample=True, temperature=0)


def test_a_temperature_divides_the_logits(fp32: Sampler) -> None:
    """Of two tokens whose logits differ by ln 4, the likelier one is drawn as its share at that temperature says."""
    logits = torch.tensor([[0.0, 3.0]]).log1p().repeat(2000, 1)  # ln 1 and ln 4
    for temperature, share in ((1.0, 4 / 5), (2.0, 2 / 3), (0.5, 16 / 17)):
        settings = TextSettings(do_sample=True, temperature=temperature)
        generators = [fp32.generator(seed) for seed in range(len(logits))]
        drawn = fp32.choose(logits, settings, generators)
        assert abs(sum(drawn) / len(drawn) - share) < 0.035, temperature


def test_an_impossible_size_is_refused_before_anything_is_read(fp32: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "read", lambda *args, **options: pytest.fail("the prompt was read"))
    with pytest.raises(BagelError, match="multiple of 16"):
        fp32.run(["a cat"], size=(65, 64))
