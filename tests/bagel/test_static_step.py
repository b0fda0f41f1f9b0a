"""Static, compiled and recorded steps give the eager steps' bits, compile once, and keep their memory in place."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

from bagel import static_step
from bagel.conformance.compare import LIMITS
from bagel.errors import BagelError
from bagel.layers import attention_kernel
from bagel.sampler import EDIT_FLOW, FlowSettings, Sampler
from bagel.static_step import GraphStep, StaticStep, Steps

PICTURE = Image.new("RGB", (48, 32), (200, 40, 40))
FLOW = FlowSettings(num_timesteps=5, cfg_text_scale=4.0, cfg_interval=(0.4, 1.0))
EDIT = FlowSettings(
    num_timesteps=4, cfg_img_scale=EDIT_FLOW.cfg_img_scale, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel"
)
RUNS: list[tuple[list[Any], FlowSettings]] = [(["a red cat"], FLOW), ([PICTURE, "make it night"], EDIT)]


def with_runtime(sampler: Sampler, runtime: Any, backend: Any = "eager") -> Sampler:
    twin = copy.copy(sampler)
    twin.step_runtime, twin.compile_backend = runtime, backend
    return twin


def latent(sampler: Sampler, turns: list[Any], flow: FlowSettings, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    found = sampler.run(turns, size=size, flow=flow, seed=3).latent
    assert found is not None
    return found


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("turns", "flow"), RUNS)
def test_a_static_step_has_the_eager_bits(
    precision: str, turns: list[Any], flow: FlowSettings, request: pytest.FixtureRequest
) -> None:
    sampler = request.getfixturevalue(precision)
    assert torch.equal(latent(with_runtime(sampler, "static"), turns, flow), latent(sampler, turns, flow))


@pytest.mark.parametrize(("turns", "flow"), RUNS)
def test_branches_in_one_static_pass(fp32: Sampler, turns: list[Any], flow: FlowSettings) -> None:
    merged, static = copy.copy(fp32), with_runtime(fp32, "static")
    merged.merge_branches = static.merge_branches = True
    assert torch.equal(latent(static, turns, flow), latent(merged, turns, flow))


def test_a_batch_has_the_eager_bits(fp32: Sampler) -> None:
    from bagel.loops import Request

    requests = [Request(["a cat"], (32, 32), 1), Request(["two dogs on a hill"], (32, 48), 2)]
    wanted = fp32.run_batch(requests, flow=FLOW)
    found = with_runtime(fp32, "static").run_batch(requests, flow=FLOW)
    for a, b in zip(found, wanted, strict=True):
        assert a.latent is not None
        assert b.latent is not None
        assert torch.equal(a.latent, b.latent)


def test_memory_stays_in_place(fp32: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recorded step needs: every input and cache at the same address at every step, one step per branch."""
    made: list[StaticStep] = []
    seen: list[tuple[int, ...]] = []
    kept = StaticStep.__init__

    def watched(self: StaticStep, *args: Any) -> None:
        kept(self, *args)
        made.append(self)

    run = StaticStep.run

    def addresses(self: StaticStep, *args: Any) -> torch.Tensor:
        tensors = [self.x, self.t, *(cached for layer in self.caches for pair in layer for cached in pair)]
        seen.append((made.index(self), *(tensor.data_ptr() for tensor in tensors)))
        return run(self, *args)

    monkeypatch.setattr(StaticStep, "__init__", watched)
    monkeypatch.setattr(StaticStep, "run", addresses)
    latent(with_runtime(fp32, "static"), *RUNS[1])
    assert len(made) == 3
    assert len(seen) == 9
    assert len(set(seen)) == 3


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_one_graph_for_all_steps_and_branches(fp32: Sampler, backend: str) -> None:
    """The bits of the eager steps, from a single graph: no breaks, and none compiled again for other contexts."""
    counter = CompileCounterWithBackend(backend)
    compiled = with_runtime(fp32, "compiled", counter)
    for turns, flow in (*RUNS, (["a much longer text about a red cat"], FLOW)):
        size = (32, 48)  # of the edit's picture, so that all have as many rows
        assert torch.equal(latent(compiled, turns, flow, size), latent(fp32, turns, flow, size))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_a_pass_that_is_no_single_graph_is_not_compiled(fp32: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> torch.Tensor:
        torch._dynamo.graph_break()
        return torch.zeros(())

    monkeypatch.setattr(static_step, "velocity", broken)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        latent(with_runtime(fp32, "compiled"), *RUNS[0])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("turns", "flow"), RUNS)
def test_inductor_stays_within_conformance(fp32: Sampler, turns: list[Any], flow: FlowSettings) -> None:
    """torch's own compiler fuses operations: its latents differ by no more than conformance allows."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("inductor needs a C++ compiler")
    found, wanted = latent(with_runtime(fp32, "compiled", "inductor"), turns, flow), latent(fp32, turns, flow)
    assert float((found - wanted).norm() / wanted.norm()) < LIMITS["fp32"]


def test_weights_elsewhere_are_refused(fp32: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(fp32.bagel), "velocity", fp32.bagel.velocity)
    with pytest.raises(BagelError, match="all weights on one device"):
        latent(with_runtime(fp32, "static"), *RUNS[0])


def test_the_exact_kernel_is_not_compiled(fp32: Sampler) -> None:
    with attention_kernel("exact"):
        assert torch.equal(latent(with_runtime(fp32, "static"), *RUNS[0]), latent(fp32, *RUNS[0]))
        with pytest.raises(BagelError, match="no exact attention kernel"):
            latent(with_runtime(fp32, "compiled"), *RUNS[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_a_graph_needs_cuda(fp32: Sampler) -> None:
    with pytest.raises(BagelError, match="needs a model on a CUDA device"):
        latent(with_runtime(fp32, "cuda-graph"), *RUNS[0])


def test_a_step_is_recorded_after_it_ran(fp32: Sampler) -> None:
    """Steps of another runtime than "cuda-graph" record nothing."""
    steps, context = Steps("static"), fp32.bagel.new_context()
    x, t = torch.zeros(4, fp32.bagel.config.latent_width), torch.tensor(0.5)
    assert steps.velocity(fp32.bagel, [context], [(2, 2)], fp32.wrap, x, t).shape == x.shape
    with pytest.raises(BagelError, match="cpu"):
        GraphStep(StaticStep(fp32.bagel, [context], [(2, 2)], fp32.wrap))
