"""`check`, the pytest plugin and the GitHub Action on a real artifact."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
import yaml
from tiny_suite import CASES, PICTURES, ROOT, TINY

from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.cli import main
from bagel_compress.parity.record import record_cases
from bagel_compress.source.checkpoint import Checkpoint

PLUGIN = "bagel_compress.validation.pytest_plugin"
TARGET = ROOT / "tests/data/tiny-target.yaml"
RECIPE = "name: %s\nrules:\n  - match: {}\n    codec: raw\nlimits: {class: lossless}\n"


@pytest.fixture(scope="module")
def built(reference, tmp_path_factory):
    """An artifact and a trace of its source."""
    folder, checkpoint = tmp_path_factory.mktemp("gate"), Checkpoint.open(TINY)
    artifact = compress(make_plan(checkpoint, Recipe.parse(RECIPE % "raw", "raw")), checkpoint, folder / "raw")
    suite = [(c, PICTURES) for c in CASES]
    trace = record_cases(reference, checkpoint.name, checkpoint.digest, suite, folder / "t.safetensors", ("repeat",))
    return artifact.path, trace.path


def test_check_passes_and_writes_parity_and_budget(built, capsys):
    artifact, trace = built
    assert main(["check", str(artifact), "--trace", str(trace), "--target", str(TARGET)]) == 0
    assert (artifact / "reports/budget-tiny.json").exists()
    assert "Memory" in (artifact / "report.html").read_text(encoding="utf-8")
    assert main(["inspect", str(artifact), "--verify"]) == 0


def test_check_closes_on_a_card_that_is_too_small(built, tmp_path, capsys):
    artifact, trace = built
    small = tmp_path / "small.yaml"
    small.write_text(
        TARGET.read_text().replace("64, context_mib", "4, context_mib").replace("name: tiny", "name: small")
    )
    assert main(["check", str(artifact), "--trace", str(trace), "--target", str(small)]) == 1
    assert "are usable on a small card" in capsys.readouterr().out
    (artifact / "reports/budget-small.json").unlink()


def test_a_report_of_another_build_is_refused(built, capsys):
    artifact, _ = built
    manifest = artifact / "manifest.json"
    before = manifest.read_bytes()
    manifest.write_bytes(before.replace(b'"tool": "', b'"tool": "x'))
    try:
        assert main(["report", str(artifact)]) == 2
        assert "belongs to another build" in capsys.readouterr().err
    finally:
        manifest.write_bytes(before)


def test_the_plugin_makes_a_test_of_every_limit(built, tmp_path):
    artifact, trace = built
    options = ["--bagel-artifact", str(artifact), "--bagel-trace", str(trace)]
    installed = any(entry.value == PLUGIN for entry in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", PLUGIN]
    command = [sys.executable, "-m", "pytest", *plugin, "-rA", "-c", "/dev/null", *options]
    (tmp_path / "test_own.py").write_text("def test_own(): pass\n")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # of the trace: other threads, another order of sums
    options = {"cwd": tmp_path, "env": os.environ | threads, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--rootdir", str(tmp_path), "."], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
    for name in ("bagel::latent.path[t2i]", "bagel::faults", "test_own"):
        assert any(name in line for line in lines), done.stdout


def test_the_action_passes_its_inputs_to_check():
    action = yaml.safe_load((ROOT / ".github/actions/parity-check/action.yml").read_text())
    workflow = yaml.safe_load((ROOT / ".github/workflows/parity-example.yml").read_text())
    used = next(s for s in workflow["jobs"]["parity"]["steps"] if s.get("uses", "").startswith("./.github/actions"))
    assert set(used["with"]) <= set(action["inputs"])
    required = {name for name, about in action["inputs"].items() if about.get("required")}
    assert required <= set(used["with"])
    assert (ROOT / used["with"]["target"]).exists()
    script = next(s["run"] for s in action["runs"]["steps"] if s.get("id") == "check")
    assert "${{" not in script  # inputs come through the environment, so that they cannot become code
