"""Limits, the noise floor, the report files, and the gate's exit codes on a real artifact."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from tiny_suite import CASES, PICTURES, TINY

from bagel_compress.build.compress import compress
from bagel_compress.build.limits import CLASSES, METRICS, Limit, resolve
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.cli import main
from bagel_compress.errors import ArtifactError, RecipeError, TraceError
from bagel_compress.parity.compare import Candidate, compare
from bagel_compress.parity.distances import measure, spans
from bagel_compress.parity.record import record_cases
from bagel_compress.parity.report_data import ParityReport
from bagel_compress.report.html import render
from bagel_compress.report.text import junit, markdown
from bagel_compress.run.case import Flow
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.validation.artifact import validate_artifact

RAW = "name: raw\nrules:\n  - match: {}\n    codec: raw\nlimits: {class: lossless}\n"
# Random weights correct nothing and are sure of nothing, so the tests' own recipe gives NF4 the room that it takes.
NF4 = """
name: lossy
rules:
  - match: {component: llm, kind: linear}
    codec: nf4
  - match: {}
    codec: raw
limits: {class: 4-bit, overrides: {latent.path: 0.5, logits.kl_mean: 0.2%s}}
"""


def build(recipe, out):
    checkpoint = Checkpoint.open(TINY)
    return compress(make_plan(checkpoint, Recipe.parse(recipe, "test.yaml")), checkpoint, out)


@pytest.fixture(scope="module")
def own_trace(reference, tmp_path_factory):
    """Traces that carry the digest of the real checkpoint."""
    checkpoint, out = Checkpoint.open(TINY), tmp_path_factory.mktemp("own") / "own.safetensors"
    suite = [(c, PICTURES) for c in CASES]
    return record_cases(reference, checkpoint.name, checkpoint.digest, suite, out).path


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    return build(NF4 % "", tmp_path_factory.mktemp("lossy") / "artifact").path


@pytest.fixture(scope="module")
def verdict(lossy, own_trace):
    return validate_artifact(lossy, [own_trace], TINY)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_every_default_names_its_source_and_a_known_metric():
    for level in CLASSES:
        for metric, limit in resolve(level, {}).items():
            assert metric in METRICS
            assert len(limit.source) > 10


def test_unknown_classes_and_metrics_are_refused():
    with pytest.raises(RecipeError, match="class is 'tight'"):
        resolve("tight", {})
    with pytest.raises(RecipeError, match=r"unknown metric 'velocity\.rel'.*did you mean velocity\.rel_l2"):
        resolve("4-bit", {"velocity.rel": 0.1})


def test_every_moment_of_the_schedule_counts_for_the_nearest_recorded_step():
    flow = Flow(num_timesteps=11, timestep_shift=1.0)
    assert spans(flow, [0, 4, 9]) == pytest.approx({0: 0.3, 4: 0.4, 9: 0.3})
    assert sum(spans(Flow(), [0, 10, 24, 48]).values()) == pytest.approx(1.0)


def test_errors_of_the_latent_and_of_the_path_are_shares_of_the_way(trace_file):
    """Every velocity a tenth too long, and the latent a tenth too far: both are a tenth."""
    trace = trace_file.read("edit")
    noise, latent = trace.tensors["noise1"], trace.tensors["latent"]
    longer = {name: 1.1 * t if name.endswith("/v") else t for name, t in trace.tensors.items()}
    further = dict(trace.tensors) | {"latent": noise + 1.1 * (latent - noise)}
    found = measure(trace, replace(trace, tensors=longer), replace(trace, tensors=further)).metrics
    assert found["velocity.path"] == pytest.approx(0.1, abs=1e-3)
    assert found["latent.path"] == pytest.approx(0.1, abs=1e-5)
    same = measure(trace, trace, trace).metrics
    assert (same["velocity.path"], same["latent.path"]) == (0.0, 0.0)


def test_texts_are_compared_where_there_are_any(trace_file):
    asked, drawn = trace_file.read("understand"), trace_file.read("t2i")
    assert measure(asked, asked, asked).metrics["text.exact"] == 1.0
    assert "text.exact" not in measure(drawn, drawn, drawn).metrics


def test_no_class_limits_a_single_step_but_a_recipe_may():
    for level in ("8-bit", "4-bit"):
        assert not {"velocity.rel_l2", "velocity.cosine"} & resolve(level, {}).keys()
    assert resolve("4-bit", {"velocity.rel_l2": 0.3})["velocity.rel_l2"] == Limit("velocity.rel_l2", 0.3, "the recipe")


def test_a_limit_below_the_floor_is_an_error(reference, trace_file):
    subject = Candidate(reference, "x", "0", "8-bit", resolve("8-bit", {"latent.path": 1e-5}))
    with pytest.raises(RecipeError, match=r"latent\.path is limited to 1e-05, below the noise floor"):
        compare(subject, [trace_file])
    subject = Candidate(reference, "x", "0", "8-bit", resolve("8-bit", {"velocity.cosine": 1.0}))
    with pytest.raises(RecipeError, match="above the noise floor"):
        compare(subject, [trace_file])


# --- the reports ------------------------------------------------------------------------------------------------------


def test_raw_is_equal_and_its_floor_is_zero(own_trace, tmp_path):
    report = validate_artifact(build(RAW, tmp_path / "raw").path, [own_trace])
    assert report.passed
    assert all(row.value == row.limit for row in report.rows)
    assert {row.floor for row in report.rows if row.metric.startswith(("latent.", "velocity."))} == {0.0}


def test_the_lossy_artifact_passes_with_a_floor_beside_every_case(verdict):
    assert verdict.passed, verdict.broken
    assert all(row.floor is not None for row in verdict.rows if row.case)
    assert {s.component for s in verdict.shares if s.velocity} == {
        "und attention", "und MLP", "gen attention", "gen MLP",
    }  # fmt: skip


def test_the_report_survives_json_and_is_refused_for_another_build(verdict, lossy):
    assert ParityReport.load(lossy, verdict.artifact) == verdict
    with pytest.raises(ArtifactError, match="belongs to another build"):
        ParityReport.load(lossy, "0" * 64)


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.outside, self.images = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action") and not (value or "").startswith("data:"):
                self.outside.append((tag, value))
        if tag == "img":
            self.images.append(dict(attrs)["src"])


def test_the_page_is_complete_and_loads_nothing(verdict, lossy):
    page = _Page((lossy / "report.html").read_text(encoding="utf-8"))
    assert page.outside == []
    assert "script" not in page.tags
    assert len(page.images) == 10  # of three cases that draw, one of them with an input
    assert all(len(image) > 2000 for image in page.images)
    assert page.tags.count("svg") >= 3
    text = (lossy / "report.html").read_text(encoding="utf-8")
    assert "Passed" in text
    assert "Error by component" in text


def test_hostile_text_stays_text(verdict):
    bad = "<script>alert(1)</script>\x00|"
    case = verdict.cases[0].model_copy(update={"prompt": bad, "has_image": False})
    report = verdict.model_copy(update={"name": bad, "faults": (bad,), "cases": (case,)})
    page = _Page(render(report, {}))
    assert "script" not in page.tags
    assert ElementTree.fromstring(junit(report).split("\n", 1)[1]).get("failures") == "1"
    assert "<script>" not in markdown(report)


def test_junit_and_markdown_say_the_same(verdict, lossy):
    suite = ElementTree.fromstring((lossy / "reports/junit.xml").read_text(encoding="utf-8").split("\n", 1)[1])
    assert suite.get("tests") == str(len(verdict.rows))
    assert suite.get("failures") == "0"
    assert "lossy: passed" in (lossy / "reports/summary.md").read_text(encoding="utf-8")


def test_the_artifact_still_verifies_with_its_reports(verdict, lossy, capsys):
    assert main(["inspect", str(lossy), "--verify"]) == 0


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_limit_that_nf4_cannot_reach_closes_the_gate(own_trace, tmp_path, capsys):
    artifact = build(NF4 % ", image.psnr: 45", tmp_path / "a")
    assert main(["validate", str(artifact.path), "--trace", str(own_trace)]) == 1
    assert "image.psnr is" in capsys.readouterr().out
    assert "Did not pass" in (artifact.path / "report.html").read_text(encoding="utf-8")


def test_validate_prints_json(verdict, lossy, own_trace, capsys):
    assert main(["validate", str(lossy), "--trace", str(own_trace), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_lpips_without_its_file_is_wrong_input(lossy, own_trace, tmp_path, capsys):
    arguments = ["validate", str(lossy), "--trace", str(own_trace), "--lpips", str(tmp_path / "none.safetensors")]
    assert main(arguments) == 2
    assert "LPIPS weights" in capsys.readouterr().err


def test_a_trace_of_another_checkpoint_is_refused(lossy, trace_file, capsys):
    with pytest.raises(TraceError, match="another checkpoint"):
        validate_artifact(lossy, [trace_file.path])
    assert main(["validate", str(lossy), "--trace", str(trace_file.path)]) == 2


def test_velocities_of_the_report_are_finite(verdict):
    steps = [s for case in verdict.cases for s in case.steps]
    assert steps
    assert all(torch.tensor([s.rel_l2, s.cosine]).isfinite().all() for s in steps)
