"""Times: the reference in turns with the build, quantiles, and limits that count only where they were measured."""

import time

import pytest
import torch

from bagel_compress.reports import BudgetReport, PhaseUse, Timing
from bagel_compress.target import Budget, Device, Target
from bagel_compress.validate.budget import judged_again
from bagel_compress.validate.latency import REPEATS, WARM_UP, timed, timings

CPU = torch.device("cpu")


def test_calls_are_taken_in_turns_after_a_warm_up():
    calls = []
    timing = timed("x", lambda: calls.append("own"), lambda: calls.append("reference"), CPU)
    assert calls == ["own", "reference"] * (WARM_UP + REPEATS)
    assert timing.reference is not None


def test_a_slower_build_has_a_ratio_above_one():
    timing = timed("x", lambda: time.sleep(0.004), lambda: time.sleep(0.001), CPU)
    assert timing.ratio > 1.5
    assert 0.004 <= timing.median <= timing.p90


def test_a_model_is_timed_beside_its_reference(reference):
    found = {t.what: t for t in timings(reference, reference)}
    assert found.keys() == {"denoising step", "decoded token", "time to first token"}
    assert all(t.median > 0 and t.ratio > 0 for t in found.values())


def report(measured_on):
    slow = (
        Timing(what="decoded token", median=0.5, p90=0.6),
        Timing(what="denoising step", median=2, p90=2, reference=1),
    )
    phase = PhaseUse(name="t2i: denoise", parts={"understanding expert": 1.0, "generation expert": 1.0})
    return BudgetReport(
        artifact="0",
        name="a",
        target="t",
        device="d",
        limit=10.0,
        phases=(phase,),
        timings=slow,
        measured_on=measured_on,
    )


@pytest.mark.parametrize("measured_on", ["d", None])
def test_limits_on_times_count_only_on_the_card(measured_on):
    device = Device(name="d", memory_mib=1)
    target = Target(name="t", device=device, budget=Budget(tokens_per_second=10, step_ratio=1.5))
    broken = judged_again(report(measured_on), target).broken
    assert len(broken) == (2 if measured_on else 0)
    if measured_on:
        assert "2.0 tokens per second, the limit is 10" in broken[0]
        assert "2.00 times the reference's" in broken[1]
