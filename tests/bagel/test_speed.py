"""Solvers have their order, and a step cache forecasts what it must and never loses guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from bagel.errors import BagelError
from bagel.events import Listener, Step
from bagel.sampler import FlowSettings, Sampler
from bagel.solvers import MultiStep
from bagel.step_cache import StepCache, Velocities

GUIDANCE = {"off": (1.0, (0.0, 1.0)), "on": (4.0, (0.0, 1.0)), "interval": (4.0, (0.4, 0.9))}


def flow_of(guidance: str, **settings: Any) -> FlowSettings:
    scale, interval = GUIDANCE[guidance]
    settings = {"num_timesteps": 9, "cfg_img_scale": 1.5, "cfg_renorm_type": "channel"} | settings
    return FlowSettings(cfg_text_scale=scale, cfg_interval=interval, **settings)


class Steps(Listener):
    def __init__(self) -> None:
        self.made: list[Step] = []

    def after_step(self, step: Step) -> Step:
        self.made.append(step)
        return step


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2), ("dpm2", 2)])
def test_a_solver_has_its_order(solver: str, order: int) -> None:
    """dx/dt = x - cos(3 t), whose solution is known; halving the steps divides the error by 2^order."""

    def exact(t: float) -> float:
        return (math.cos(3 * t) - 3 * math.sin(3 * t)) / 10 + 2 * math.exp(t)

    def error(steps: int) -> float:
        x, solve = torch.tensor(exact(0.9), dtype=torch.float64), MultiStep(solver, lambda v: v)
        times = [0.9 - 0.6 * i / steps for i in range(steps + 1)]
        for t, t_next in pairwise(times):
            x = x - solve.velocity(x, x - math.cos(3 * t), t, t_next, True) * (t - t_next)
        return abs(float(x) - exact(0.3))

    assert error(100) / error(200) == pytest.approx(2**order, rel=0.1)


def test_heun_comes_nearer_to_the_exact_solution(fp32: Sampler) -> None:
    """With as many evaluations as Euler: 2 a step, 1 in the last one."""

    def drawn(**settings: Any) -> tuple[torch.Tensor, int]:
        steps = Steps()
        latent = fp32.run(["a cat"], size=(32, 32), flow=flow_of("on", **settings), listener=steps).latent
        return latent, sum(step.passes for step in steps.made)

    wanted, _ = drawn(num_timesteps=97)
    (heun, ours), (euler, theirs) = drawn(num_timesteps=17, solver="heun"), drawn(num_timesteps=32)
    assert ours == theirs == 31 * 2
    assert (heun - wanted).norm() < (euler - wanted).norm()


class Polynomials:
    """Branches whose velocities are polynomials of degree 2 in t."""

    def __init__(self) -> None:
        self.asked: list[tuple[bool, bool]] = []

    def at(self, t: float) -> tuple[torch.Tensor, ...]:
        row = torch.arange(3, dtype=torch.float64)
        return row * t * t + 1, row + 2 * t * t - t, 3 * row * t - t * t

    def network(self, t: float) -> Any:
        def answer(text: bool, image: bool) -> Velocities:
            self.asked.append((text, image))
            v, v_text, v_image = self.at(t)
            return v, v_text if text else None, v_image if image else None

        return answer


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize(
    "settings", [{"cache_every": 3}, {"guidance_every": 2}, {"cache_every": 2, "guidance_every": 2}]
)
def test_forecasts_are_exact_for_polynomials_of_their_order(guidance: str, settings: dict[str, int]) -> None:
    flow = flow_of(guidance, cache_order=2, **settings)
    made, cache = Polynomials(), StepCache(flow, lambda v: v)
    times = [1 - i / 30 for i in range(30)]
    for index, t in enumerate(times):
        guided = flow.guides(t) and flow.cfg_text_scale > 1
        found = cache.velocities(made.network(t), torch.zeros(3), t, guided, guided)
        assert [v is not None for v in found] == [True, guided, guided]
        known = made.asked.count((True, True)) >= 3 or not guided
        if index > 6 and known:
            for value, wanted in zip(found, made.at(t), strict=True):
                if value is not None:
                    torch.testing.assert_close(value, wanted)
    assert len(made.asked) <= 30 / settings.get("cache_every", 1) + 1
    if "guidance_every" in settings and guidance != "off":
        assert 3 <= sum(text for text, _ in made.asked) <= len(made.asked) * 0.6


def test_where_guidance_begins_its_branches_are_evaluated() -> None:
    made, cache = Polynomials(), StepCache(flow_of("on", cache_every=4), lambda v: v)
    for t in (1.0, 0.9):
        cache.velocities(made.network(t), torch.zeros(3), t, False, False)
    _, text, image = cache.velocities(made.network(0.8), torch.zeros(3), 0.8, True, True)
    assert made.asked == [(False, False), (True, True)]
    assert text is not None
    assert image is not None


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize(
    "settings", [{"cache_threshold": 1e-9}, {"cache_every": 2, "cache_order": 2}, {"cache_threshold": 0.1}]
)
def test_guidance_stays_with_a_cache(bf16: Sampler, guidance: str, settings: dict[str, Any]) -> None:
    """The same steps are guided, and what is evaluated at every step is the sampler without a cache, to the bit."""
    turns: Sequence[Any] = ["a red cat"]
    plain, cached = Steps(), Steps()
    flow = flow_of(guidance, num_timesteps=33)
    wanted = bf16.run(turns, size=(32, 32), flow=flow, listener=plain).latent
    found = bf16.run(turns, size=(32, 32), flow=flow_of(guidance, num_timesteps=33, **settings), listener=cached).latent
    assert [s.v_text is None for s in plain.made] == [s.v_text is None for s in cached.made]
    assert [s.v_image is None for s in plain.made] == [s.v_image is None for s in cached.made]
    assert found is not None
    assert wanted is not None
    if settings == {"cache_threshold": 1e-9}:
        assert torch.equal(found, wanted)
        assert not any(step.forecast for step in cached.made)
    else:
        assert sum(s.passes for s in cached.made) < 0.7 * sum(s.passes for s in plain.made)
        unguided = bf16.run(turns, size=(32, 32), flow=flow_of("off", num_timesteps=33)).latent
        near, far = (found - wanted).norm(), (unguided - wanted).norm()
        assert guidance == "off" or near < 0.5 * far


def test_speed_settings_that_are_refused() -> None:
    for name, value in (
        ("solver", "rk4"), ("cache_every", 0), ("cache_order", 3), ("cache_threshold", 1.0), ("guidance_every", 0),
    ):  # fmt: skip
        with pytest.raises(BagelError, match=name):
            FlowSettings(**{name: value})
    with pytest.raises(BagelError, match="one of them"):
        FlowSettings(cache_every=2, cache_threshold=0.1)
    with pytest.raises(BagelError, match="heun"):
        FlowSettings(solver="heun", cache_every=2)


def test_the_last_step_of_dpm2_is_an_euler_step() -> None:
    solver = MultiStep("dpm2", lambda x: x)
    solver.velocity(torch.tensor([1.0]), torch.tensor([2.0]), 0.5, 0.25, guided=True)
    assert solver.velocity(torch.tensor([0.5]), torch.tensor([3.0]), 0.25, 0.0, guided=True).tolist() == [3.0]
