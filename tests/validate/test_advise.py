"""advise: what to take for a GPU, and the packaged names in every "does not fit"."""

from __future__ import annotations

import shlex
from types import SimpleNamespace
from typing import Any

import pytest

from bagel_compress.budgets import advise as advising
from bagel_compress.budgets.advise import advice_table, advise
from bagel_compress.budgets.machine import Machine
from bagel_compress.budgets.plan_devices import Gpu, plan_map
from bagel_compress.budgets.planned_build import planned_build
from bagel_compress.budgets.predict import least_bytes, predict
from bagel_compress.budgets.recommend import packaged_targets, recipes_for, target_variants
from bagel_compress.cli import main
from bagel_compress.errors import TargetError
from bagel_compress.run.target import Target

GIB = 2**30


def names(targets: list[Target]) -> list[str]:
    return [target.name for target in targets]


def test_a_gpu_is_used_in_every_packaged_way_that_it_holds() -> None:
    assert names(target_variants(Target.load("12gb"))) == ["12gb", "12gb-resident", "8gb"]
    assert names(target_variants(Target.load("24gb")))[:2] == ["24gb", "16gb-resident"]
    assert names(target_variants(Target.load("ort-cpu"))) == ["ort-cpu"]


def test_promises_hold_on_larger_gpus_and_the_best_comes_first() -> None:
    assert recipes_for(Target.load("12gb")) == ["ecq-12gb"]
    assert "nf4" in recipes_for(Target.load("24gb"))  # it promises 16gb
    on_16 = recipes_for(Target.load("16gb"))
    assert on_16.index("ecq-16gb") < on_16.index("nf4") < on_16.index("nf4-official")


def test_the_least_that_a_build_holds_is_a_bound_of_its_peak() -> None:
    build = planned_build("mixed-12gb", None)
    for name in ("12gb", "12gb-resident", "8gb"):
        target = Target.load(name).model_copy(update={"tasks": ("t2i",)})
        report, least = predict(build, target), least_bytes(build.units, target, 28)
        assert least < report.peak < least + 4 * GIB


def test_gpus_that_are_too_small_together_are_told_what_fits() -> None:
    gpus = [Gpu("cuda:0", "a", 11 * GIB), Gpu("cuda:1", "b", 1)]
    with pytest.raises(TargetError, match="more devices: recipe ecq-12gb fits the largest of them alone"):
        plan_map(planned_build("df11", None), gpus)


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks without the passes: the least that a build holds and 3 GiB."""

    def peak(build: Any, target: Target) -> Any:
        total = least_bytes(build.units, target, build.config.llm.num_layers) + 3 * GIB
        return SimpleNamespace(peak=total, broken=["too much"] if total > target.limit else [])

    monkeypatch.setattr(advising, "predict", peak)


@pytest.mark.usefixtures("guessed")
def test_recipes_are_ranked_by_error_and_their_commands_are_verbs() -> None:
    choices = advise([Target.load("24gb")], count=20)
    assert [c.errors.all for c in choices] == sorted(c.errors.all for c in choices)
    assert "fp8-vllm" in next(c for c in choices if "fp8" in c.name).alike
    resident = next(c for c in advise([Target.load("12gb")], count=20) if c.placed)
    assert f"--target {resident.target}" in resident.commands[-1]
    assert all(c.download > 29e9 and c.disk > c.download + c.weights - 1 for c in choices)
    calibrated = next(c for c in choices if c.calibrated)
    assert "calibrate" in calibrated.commands[2]
    assert calibrated.build_seconds is None
    table = advice_table(choices, Machine(disk=10**9, memory=None))
    assert "too little for any of them" in table
    assert "bagel-compress compress" in table


@pytest.mark.usefixtures("guessed")
def test_a_source_that_lies_here_needs_no_download(tiny: Any) -> None:
    [choice] = advise([Target.load("16gb")], source=str(tiny), count=1)
    assert (choice.download, choice.disk) == (0, choice.weights)


def test_without_a_gpu_the_targets_are_named(cli: Any) -> None:
    code, _, err = cli("advise")
    if code == 2:  # this machine has no GPU
        assert "12gb-resident" in err


@pytest.mark.slow
@pytest.mark.parametrize("target", packaged_targets())
def test_the_commands_of_every_packaged_target_run(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    if target in ("nano", "trt-rtx3060-12gb"):  # made for BAGEL-nano; holds no shipped recipe at 768 x 768
        with pytest.raises(TargetError, match="no packaged recipe and no given build fits"):
            advise([Target.load(target)])
        return
    for choice in advise([Target.load(target)], count=2):
        for command in choice.commands[:2]:  # budget and plan; the others need the weights
            assert main(shlex.split(command)[1:]) == 0, command
    assert "fits" in capsys.readouterr().out
