"""Denoising steps as CUDA graphs have the eager steps' bits; compiled ones differ by rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from bagel.flow import FlowSettings
from bagel.sampler import EDIT_FLOW, Sampler
from bagel.static_step import StepRuntime

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
TINY = Path(__file__).parents[1] / "data" / "golden" / "checkpoint"
PICTURE = Image.new("RGB", (48, 32), (200, 40, 40))
DRAW = FlowSettings(num_timesteps=5, cfg_interval=(0.4, 1.0))
EDIT = FlowSettings(num_timesteps=4, cfg_img_scale=2.0, cfg_interval=EDIT_FLOW.cfg_interval)
RUNS = [(["a red cat"], DRAW), ([PICTURE, "make it night"], EDIT)]
ROUNDING = 1e-4  # in fp32, of the latent


def latent(sampler: Sampler, runtime: StepRuntime, turns: list, flow: FlowSettings) -> torch.Tensor:
    sampler.step_runtime = runtime
    found = sampler.run(turns, size=(32, 48), flow=flow, seed=3).latent
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("turns", "flow"), RUNS)
@pytest.mark.parametrize("merged", [False, True])
def test_recorded_steps_have_the_eager_bits(dtype: torch.dtype, turns: list, flow: FlowSettings, merged: bool) -> None:
    sampler = Sampler.from_dir(TINY, "cuda", dtype)
    sampler.merge_branches = merged
    assert torch.equal(latent(sampler, "cuda-graph", turns, flow), latent(sampler, "eager", turns, flow))


@pytest.mark.parametrize(("turns", "flow"), RUNS)
def test_compiled_steps_differ_by_rounding(turns: list, flow: FlowSettings) -> None:
    sampler = Sampler.from_dir(TINY, "cuda", torch.float32)
    found, wanted = (latent(sampler, runtime, turns, flow) for runtime in ("compiled", "eager"))
    assert (found - wanted).norm() <= ROUNDING * wanted.norm()
