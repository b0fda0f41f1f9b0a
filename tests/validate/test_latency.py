"""Times: the reference in turns with the build, what is timed for whom, limits that count only on the target's card."""

import json
import time

import pytest
import torch
from tiny_suite import CASES, PICTURES, ROOT, TINY

from bagel_compress.budgets import latency
from bagel_compress.budgets.latency import PICTURES as PICTURE_REPEATS
from bagel_compress.budgets.latency import PICTURES_WARM_UP, REPEATS, WARM_UP, timed, timings
from bagel_compress.budgets.predict import with_verdict
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.cli import main
from bagel_compress.parity.record import record_cases
from bagel_compress.parity.report_data import FIRST_TOKEN, IMAGE, STEP, TOKEN, BudgetReport, PhaseUse, Timing
from bagel_compress.publishing.card_sections import Origin
from bagel_compress.publishing.model_card import model_card
from bagel_compress.publishing.release_reports import ReleaseReports
from bagel_compress.run.target import Budget, Device, Target, Workload
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.validation.artifact import validate_artifact

CPU = torch.device("cpu")
CARD = Device(name="d", memory_mib=64, context_mib=0)
TINY_TARGET = Target(name="t", device=CARD, sizes=Workload(image=(32, 32), prompt_tokens=8))
NF4 = "name: nf4\nrules:\n  - match: {kind: linear}\n    codec: nf4\n  - match: {}\n    codec: raw\n"
# Limits that no processor holds: they are the card's, so nothing here may close the gate.
IMPATIENT = """
name: impatient
device: {name: a fast card, memory_mib: 64, context_mib: 0}
sizes: {image: [32, 32], input_image: [32, 32], prompt_tokens: 8, think_tokens: 8, answer_tokens: 8}
budget: {seconds_per_image: 0.000001, tokens_per_second: 1000000000, step_ratio: 0.000001}
"""


def test_calls_are_taken_in_turns_after_a_warm_up():
    calls = []
    timing = timed("x", lambda: calls.append("own"), lambda: calls.append("reference"), CPU)
    assert calls == ["own", "reference"] * (WARM_UP + REPEATS)
    assert timing.reference is not None


def test_whole_pictures_are_repeated_less_often():
    calls = []
    timed(IMAGE, lambda: calls.append(1), None, CPU)
    assert len(calls) == PICTURES_WARM_UP + PICTURE_REPEATS


@pytest.mark.parametrize(("what", "slow", "counted"), [("x", 2, 7), (IMAGE, 1, 3)])
def test_slow_first_calls_are_not_counted(monkeypatch, what, slow, counted):
    taken = iter([9.0] * slow + [1.0] * counted)
    monkeypatch.setattr(latency, "_seconds", lambda run, device: next(taken))
    timing = timed(what, lambda: None, None, CPU)
    assert (timing.median, timing.p90, list(taken)) == (1.0, 1.0, [])


def test_a_slower_build_has_a_ratio_above_one():
    timing = timed("x", lambda: time.sleep(0.004), lambda: time.sleep(0.001), CPU)
    assert timing.ratio > 1.5
    assert 0.004 <= timing.median <= timing.p90


def test_a_model_is_timed_beside_its_reference(reference):
    text = reference.text
    found = {t.what: t for t in timings(reference, TINY_TARGET, reference)}
    assert found.keys() == {STEP, IMAGE, FIRST_TOKEN, TOKEN}
    assert all(t.median > 0 and t.ratio > 0 for t in found.values())
    assert found[IMAGE].median > 20 * found[STEP].median / 2  # 49 steps, guided and not, against one guided step
    assert reference.text is text


def test_only_what_a_target_asks_for_is_timed(reference):
    drawing = {t.what for t in timings(reference, TINY_TARGET.model_copy(update={"tasks": ("edit",)}))}
    writing = {t.what for t in timings(reference, TINY_TARGET.model_copy(update={"tasks": ("understand",)}))}
    assert (drawing, writing) == ({STEP, IMAGE}, {FIRST_TOKEN, TOKEN})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    checkpoint = Checkpoint.open(TINY)
    plan = make_plan(checkpoint, Recipe.parse(NF4, "nf4"))
    return compress(plan, checkpoint, tmp_path_factory.mktemp("latency") / "nf4").path


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("WARM_UP", 0), ("REPEATS", 1), ("PICTURES_WARM_UP", 0), ("PICTURES", 1)):
        monkeypatch.setattr(latency, name, value)


@pytest.fixture
def impatient(tmp_path):
    path = tmp_path / "impatient.yaml"
    path.write_text(IMPATIENT)
    return str(path)


def test_a_report_made_on_a_cpu_says_so_and_closes_no_gate(built, reference, quick, impatient, tmp_path, capsys):
    checkpoint = Checkpoint.open(TINY)
    suite = [(c, PICTURES) for c in CASES if c.name == "understand"]
    trace = record_cases(reference, checkpoint.name, checkpoint.digest, suite, tmp_path / "t.safetensors", ("repeat",))
    validate_artifact(built, [trace.path])
    arguments = ["budget", str(built), "--target", impatient, "--device", "cpu", "--source", str(TINY)]
    assert main([*arguments, "--json"]) == 0
    [budget] = json.loads(capsys.readouterr().out)["budgets"]
    assert budget["timed_on"].startswith("CPU (")
    assert budget["measured_on"] is None
    assert all(phase["measured"] is None for phase in budget["phases"])
    assert all(timing["reference"] > 0 for timing in budget["timings"])
    assert "Times measured on CPU (" in (built / "report.html").read_text(encoding="utf-8")
    report = BudgetReport.model_validate_json((built / "reports/budget-impatient.json").read_text(encoding="utf-8"))
    card = model_card(Artifact.open(built), ReleaseReports(budgets=(report,)), Origin("ann/bagel", None))
    assert "CPU \\(" in card
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "times on CPU (" in out
    assert "tokens/s" in out


def test_a_source_is_timed_only_with_a_device_and_only_if_it_is_the_artifacts(built, impatient, nano, capsys):
    arguments = ["budget", str(built), "--target", impatient]
    assert main([*arguments, "--source", str(TINY)]) == 2
    assert "give --device to measure" in capsys.readouterr().err
    assert main([*arguments, "--source", str(nano), "--device", "cpu"]) == 2
    assert "give its source" in capsys.readouterr().err


@pytest.fixture
def nano():
    return ROOT / "bagel_compress/data/BAGEL-nano"


def report(timed_on):
    slow = (
        Timing(what=TOKEN, median=0.5, p90=0.6),
        Timing(what=STEP, median=2, p90=2, reference=1),
        Timing(what=IMAGE, median=90, p90=95),
    )
    phase = PhaseUse(name="t2i: denoise", parts={"understanding expert": 1.0, "generation expert": 1.0})
    return BudgetReport(
        artifact="0", name="a", target="t", device="d", limit=10.0, phases=(phase,), timings=slow, timed_on=timed_on
    )


@pytest.mark.parametrize("timed_on", ["d", None, "CPU (a fast one, 1 thread)", "another card"])
def test_limits_on_times_count_only_on_the_card(timed_on):
    budget = Budget(tokens_per_second=10, step_ratio=1.5, seconds_per_image=60)
    broken = with_verdict(report(timed_on), Target(name="t", device=CARD, budget=budget)).broken
    assert len(broken) == (3 if timed_on == "d" else 0)
    if timed_on == "d":
        assert "2.0 tokens per second, the limit is 10" in broken[0]
        assert "2.00 times the reference's" in broken[1]
        assert "an image takes 90.0 s, the limit is 60" in broken[2]


def test_without_a_reference_no_ratio_is_limited():
    target = Target(name="t", device=CARD, budget=Budget(step_ratio=1.5))
    alone = report("d").model_copy(update={"timings": (Timing(what=STEP, median=2, p90=2),)})
    assert with_verdict(alone, target).broken == []
