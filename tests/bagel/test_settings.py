"""Settings that cannot be meant are refused before any work, and numbers that are not finite end a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagel.errors import BagelError
from bagel.finite import check_finite
from bagel.sampler import Sampler
from bagel.settings import SOLVERS, FlowSettings, TextSettings, check_seed

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("timestep_shift", (NAN, INF, -INF, 0, -1.0, 1e7, "3", True)),
        ("cfg_text_scale", (NAN, INF, -INF, "4", None)),
        ("cfg_img_scale", (NAN, INF, -INF)),
        ("cfg_renorm_min", (NAN, INF, -0.1, 1.1, 2)),
        ("cfg_interval", ((NAN, 1.0), (0.0, NAN), (0.0, INF), (0.9, 0.2))),
        ("num_timesteps", (1, 0, -5, 2.5, NAN, True)),
    ],
)
def test_flow_settings_that_are_refused(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(BagelError, match=name):
            FlowSettings(**{name: value})


def test_flow_settings_at_their_ends() -> None:
    FlowSettings(2, 1e6, 0.0, -4.0, (0.5, 0.5), 1.0)
    FlowSettings(cfg_text_scale=np.float32(2), cfg_renorm_min=0, cfg_interval=(0, 1))


def test_text_settings() -> None:
    for value in (NAN, INF, 0.0, -1.0, 1e-40):
        with pytest.raises(BagelError, match="temperature is"):
            TextSettings(do_sample=True, temperature=value)
    TextSettings(temperature=0.0)
    with pytest.raises(BagelError, match="temperature is nan"):
        TextSettings(temperature=NAN)
    for count in (0, -1, 1.5, True):
        with pytest.raises(BagelError, match="max_tokens is"):
            TextSettings(max_tokens=count)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, -(2**63) - 1, 1.0, True, "1"])
def test_seeds_that_are_refused(fp32: Sampler, seed: Any) -> None:
    with pytest.raises(BagelError, match="the seed is"):
        check_seed(seed)
    with pytest.raises(BagelError, match="the seed is"):
        fp32.run(["a cat"], size=(32, 32), seed=seed)


def test_seeds_at_their_ends() -> None:
    assert (check_seed(0), check_seed(2**63 - 1)) == (0, 2**63 - 1)


def test_the_temperature_divides_the_logits(fp32: Sampler) -> None:
    """At 0.5 the odds of two tokens are squared: 1 to 9 instead of 1 to 3."""
    logits = torch.log(torch.tensor([[1.0, 3.0]])).repeat(20_000, 1)
    one = [fp32.generator(1)]
    for temperature, share in ((1.0, 3 / 4), (0.5, 9 / 10), (2.0, 3**0.5 / (1 + 3**0.5))):
        drawn = fp32.choose(logits, TextSettings(do_sample=True, temperature=temperature), one * len(logits))
        assert abs(sum(drawn) / len(drawn) - share) < 0.015  # five standard deviations


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_finite(value: float) -> None:
    for make in (torch.tensor, np.array):
        check_finite("numbers", make([1.0, -3e38]))
        with pytest.raises(BagelError, match=r"numbers hold values that are not finite"):
            check_finite("numbers", make([1.0, value]))


def damaged(tiny: Path, name: str, value: float) -> Sampler:
    """The tiny model with one value of one tensor replaced."""
    sampler = Sampler.from_dir(tiny, dtype=torch.float32)
    sampler.bagel.get_parameter(name).view(-1)[7] = value
    return sampler


def test_a_run_whose_numbers_are_not_finite_ends(tiny: Path) -> None:
    with pytest.raises(BagelError, match="after step 1 of 2"):
        damaged(tiny, "llm2vae.bias", NAN).run(["a cat"], size=(32, 32), flow=FlowSettings(num_timesteps=3))


def test_text_whose_logits_are_not_finite_ends(tiny: Path) -> None:
    with pytest.raises(BagelError, match="the logits of the next token"):
        damaged(tiny, "lm_head.weight", INF).run(["a cat"], output="text", text=TextSettings(max_tokens=3))


def test_the_defaults_are_the_published_settings() -> None:
    flow = FlowSettings()
    assert (flow.num_timesteps, flow.timestep_shift, flow.cfg_text_scale, flow.cfg_img_scale) == (50, 3.0, 4.0, 1.0)
    assert (flow.cfg_interval, flow.cfg_renorm_min, flow.cfg_renorm_type) == ((0.4, 1.0), 0.0, "global")
    assert not flow.forecasts
    text = TextSettings()
    assert (text.max_tokens, text.do_sample, text.temperature) == (1000, False, 0.3)


def test_guidance_ends_at_the_lower_end_of_its_interval() -> None:
    flow = FlowSettings(cfg_interval=(0.4, 0.9))
    assert [flow.guides(t) for t in (0.0, 0.4, 0.41, 0.9, 0.91, 1.0)] == [False, False, True, True, False, False]


def test_a_hint_is_given_where_it_helps() -> None:
    for wrong, helped in (("local", True), ("a", False), ("zzz", False)):
        with pytest.raises(BagelError) as refused:
            FlowSettings(cfg_renorm_type=wrong)
        assert ("'local' of older menus" in str(refused.value)) == helped


def test_only_heun_takes_no_cache() -> None:
    with pytest.raises(BagelError, match="heun evaluates the network twice"):
        FlowSettings(solver="heun", cache_every=2)
    for solver in set(SOLVERS) - {"heun"}:
        assert FlowSettings(solver=solver, cache_every=2).forecasts
    assert FlowSettings(cache_threshold=0.1).forecasts
    assert FlowSettings(guidance_every=2).forecasts
    assert not FlowSettings(solver="heun").forecasts
