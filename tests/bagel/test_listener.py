"""Events of a run: their order, what a listener may replace, and that it can stop a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from bagel.errors import Cancelled
from bagel.events import Drawing, Listener, Prefill, Step, StepInput
from bagel.sampler import FlowSettings, Request, Sampler, TextSettings

FLOW = FlowSettings(num_timesteps=4, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel")
TEXT = TextSettings(max_tokens=4)
PICTURE = Image.effect_mandelbrot((48, 32), (-2.0, -1.5, 1.0, 1.5), 50).convert("RGB")


class Names(Listener):
    """The names of all events, in order, and what some of them carried."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.tokens: list[tuple[int, int]] = []
        self.steps: list[Step] = []

    def __getattribute__(self, name: str) -> Any:
        if name in vars(Listener) and not name.startswith("_"):
            self.seen.append(name)
        return super().__getattribute__(name)

    def token(self, sample: int, token: int) -> None:
        self.tokens.append((sample, token))

    def after_step(self, step: Step) -> Step:
        self.steps.append(step)
        return step


def test_events_come_in_the_order_of_a_run(bf16: Sampler) -> None:
    names = Names()
    result = bf16.run([PICTURE, "make it night"], think=True, flow=FLOW, text=TEXT, listener=names)
    fill = ["before_prefill", "after_prefill"]
    thinking = [name for name in names.seen if name in ("before_decode", "thoughts")]
    assert names.seen[:9] == [*fill, "before_encode", *fill, *fill, *fill]  # system prompt, VAE, ViT, prompt; dropped
    assert thinking == ["before_decode", "thoughts"]
    steps = ["before_step", "after_step"] * 3
    assert names.seen[-10:] == [*fill, "before_denoise", *steps, "before_picture"]
    assert result.ids[1:] == [token for _, token in names.tokens]
    assert [(step.index, step.count) for step in names.steps] == [(0, 3), (1, 3), (2, 3)]


def test_a_listener_that_only_hears_changes_no_bit(bf16: Sampler) -> None:
    heard = bf16.run([PICTURE, "make it night"], flow=FLOW, seed=3, listener=Names()).latent
    alone = bf16.run([PICTURE, "make it night"], flow=FLOW, seed=3).latent
    assert heard is not None
    assert alone is not None
    assert torch.equal(heard, alone)


def test_tokens_of_a_batch_are_told_with_their_sample(fp32: Sampler) -> None:
    names = Names()
    found = fp32.run_batch([Request(["a red cat"]), Request(["man why"])], output="text", text=TEXT, listener=names)
    for sample, result in enumerate(found):
        assert [token for who, token in names.tokens if who == sample] == result.ids[1:]


def test_the_last_preview_is_the_latent(bf16: Sampler) -> None:
    names = Names()
    result = bf16.run(["a cat"], size=(32, 32), flow=FlowSettings(num_timesteps=3), listener=names)
    torch.testing.assert_close(names.steps[-1].preview, result.latent)
    assert bf16.picture(names.steps[0].preview, (2, 2)).size == (32, 32)


class Teacher(Listener):
    """Forces ids, thoughts, the second step's x and the latent; leaves the first step out."""

    def __init__(self, ids: Sequence[int], latent: Tensor, eos: int) -> None:
        self.ids, self.latent, self.eos = [*ids, eos], latent, eos
        self.content: list[Sequence[Any]] = []
        self.made: list[Step] = []

    def before_prefill(self, work: Prefill) -> Prefill:
        self.content.append(work.content)
        return work

    def logits(self, samples: Sequence[int], logits: Tensor) -> list[int]:
        return [self.ids.pop(0)]

    def thoughts(self, texts: Sequence[str]) -> list[str]:
        return ["a red cat"]

    def before_step(self, work: StepInput) -> StepInput | None:
        return None if work.index == 0 else replace(work, x=self.latent) if work.index == 1 else work

    def after_step(self, step: Step) -> Step:
        self.made.append(step)
        return replace(step, x_next=self.latent) if step.index == 2 else step


def test_a_listener_may_replace_what_a_run_goes_on_with(bf16: Sampler) -> None:
    latent = torch.randn((4, bf16.bagel.config.latent_width), generator=torch.Generator().manual_seed(9))
    teacher = Teacher([5, 77], latent, bf16.text.eos)
    result = bf16.run(["a cat"], think=True, size=(32, 32), flow=FLOW, text=TEXT, listener=teacher)
    assert result.ids == [bf16.text.bos, 5, 77]
    assert teacher.content[-1] == [bf16.text.turn("a red cat")]
    assert [step.index for step in teacher.made] == [1, 2]
    assert torch.equal(teacher.made[0].x, latent)
    assert torch.equal(teacher.made[1].x, teacher.made[0].x_next)
    assert result.latent is not None
    assert torch.equal(result.latent, latent)


class Tapped(Listener):
    """Taps every prefill and the second step."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def _tap(self, name: str, rows: Tensor) -> None:
        self.names.append(name)

    def before_prefill(self, work: Prefill) -> Prefill:
        return replace(work, tap=self._tap)

    def before_denoise(self, drawing: Drawing) -> None:
        self.names.append("denoise")

    def before_step(self, work: StepInput) -> StepInput:
        return replace(work, tap=self._tap) if work.index == 1 else work


def test_taps_see_the_states_of_the_passes_they_were_given_to(bf16: Sampler) -> None:
    tapped = Tapped()
    bf16.run(["a cat"], size=(32, 32), flow=FLOW, listener=tapped)
    layers = [f"layer{i}" for i in range(bf16.bagel.config.llm.num_layers)]
    before, after = tapped.names[: tapped.names.index("denoise")], tapped.names[tapped.names.index("denoise") + 1 :]
    assert before == layers
    assert after == ["packed_vae_position_ids", "time_embed", "vae2llm_out", "seq_in", *layers]


@pytest.mark.parametrize("event", ["before_prefill", "logits", "token", "before_step", "after_step", "before_picture"])
def test_a_run_is_cancelled_at_any_event(bf16: Sampler, event: str) -> None:
    class Stop(Listener):
        pass

    def stop(self: Listener, *values: object) -> None:
        raise Cancelled

    setattr(Stop, event, stop)
    with pytest.raises(Cancelled):
        bf16.run(["a cat"], think=True, size=(32, 32), flow=FLOW, text=TEXT, listener=Stop())
    assert bf16.run(["a cat"], size=(32, 32), flow=FLOW).image is not None


def test_rows_of_a_batch_are_cut_by_the_grids_of_its_samples() -> None:
    drawing = Drawing(branches=None, grids=((2, 3), (1, 4), (3, 3)), flow=FLOW, times=range(5))  # type: ignore[arg-type]
    assert drawing.split(list(range(19))) == [[*range(6)], [*range(6, 10)], [*range(10, 19)]]
    assert drawing.count == 4
