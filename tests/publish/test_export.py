"""Exports are published like artifacts: same gates, same upload, same checks; what was never run is never hidden."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hub import Fault, Hub
from PIL import Image
from publish_data import BASE, flip, parity

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from test_snippets import run_shell

from bagel_compress.build.artifact import Artifact
from bagel_compress.errors import ArtifactError, GateError, PublishError
from bagel_compress.exporting.build import export
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.exporting.source import WeightSource
from bagel_compress.io.digests import sha256_file
from bagel_compress.publishing.card_sections import Origin
from bagel_compress.publishing.collection_table import CollectionRow
from bagel_compress.publishing.export_card import card_of as export_card
from bagel_compress.publishing.pipeline import PublishResult
from bagel_compress.publishing.release import Release, make_release
from bagel_compress.publishing.release_reports import load_reports
from bagel_compress.publishing.snippets import export_snippets
from bagel_compress.publishing.verify import verify_folder
from bagel_compress.run.export_settings import Range
from bagel_compress.run.target import Target

Cli = Callable[..., tuple[int, str, str]]
Publish = Callable[..., PublishResult]
REPO = "ann/BAGEL-7B-MoT-INT8-ONNX"
ORIGIN = Origin(REPO, BASE)
ON_CPU = {"runtime": "onnxruntime", "version": "1.32", "provider": "cpu", "precision": "fp32", "device": "cpu"}
PROMPT, FLAGS = "a red teapot", ("--steps", 4, "--size", "64x64", "--seed", 7)


def target(name: str, **settings: object) -> Target:
    device = {"name": "NVIDIA GeForce RTX 4090", "memory_mib": 24564}
    return Target.model_validate({"name": name, "device": device, "export": settings, "budget": {"disk_gb": 1}})


@pytest.fixture(scope="session")
def graphs(
    built: Callable[[str], Artifact], tmp_path_factory: pytest.TempPathFactory, templates: dict[str, bytes]
) -> ExportFolder:
    """An INT8 build for ONNX Runtime on the CPU, without reports. Do not change it."""
    out = tmp_path_factory.mktemp("graphs") / "int8-onnx"
    return export(WeightSource.open(built("int8-24gb").path), target("ort-test"), out, templates=templates)


@pytest.fixture
def own(graphs: ExportFolder, tmp_path: Path) -> ExportFolder:
    """The same with a report that passes, of this test's own."""
    folder = tmp_path / "onnx"
    shutil.copytree(graphs.path, folder)
    opened = ExportFolder.open(folder)
    parity(opened, environment=ON_CPU).save(folder)
    return opened


@pytest.fixture
def engines(built: Callable[[str], Artifact], tmp_path: Path) -> ExportFolder:
    """Two real engines with a report on their graphs."""
    pytest.importorskip("tensorrt_rtx")
    settings = {"runtime": "tensorrt-rtx", "precision": "bf16", "capabilities": ("sm89",)}
    wanted = target("rtx-test", blocks=("embed", "latent_out"), **settings)
    folder = export(WeightSource.open(built("fp8-24gb").path), wanted, tmp_path / "rtx")
    parity(folder, environment=ON_CPU).save(folder.path)
    return folder


def release(folder: ExportFolder, tmp_path: Path, **options: bool) -> Release:
    return make_release(folder, tmp_path / "release", ORIGIN, **options)


def card_of(made: Release) -> str:
    return (made.folder / "README.md").read_text(encoding="utf-8")


def test_the_same_picture_after_the_journey(
    hub: Hub, graphs: ExportFolder, tiny: Path, tmp_path: Path, cli: Cli, fresh_cache: Callable[[], Path],
    small_cases: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Judged for real, published through faults, pulled by a stranger, verified, run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(graphs.path, "onnx")
    assert cli("trace", small_cases, "--source", tiny, "--out", "t.safetensors", "--floor", "none")[0] == 0
    code, out, err = cli("validate", "onnx", "--trace", "t.safetensors")
    assert code == 0, out + err
    assert cli("generate", "onnx", PROMPT, *FLAGS, "--out", "before.png")[0] == 0

    hub.faults = [Fault("PUT /lfs/", times=2), Fault("PUT /lfs/", "cut")]
    code, out, err = cli("publish", "onnx", REPO, "--base-model", BASE, "--json")
    assert code == 0, err
    receipt = json.loads((tmp_path / "exports/receipts/int8-24gb-ort-test--ort-test.json").read_text())
    assert receipt["parity_on"].startswith("onnxruntime ")
    assert (receipt["artifact"], receipt["peak_predicted"], receipt["not_run"]) == (graphs.digest, None, [])

    shutil.rmtree("onnx")
    fresh_cache()
    for how in ((), ("--full",)):
        code, out, err = cli("verify", REPO, *how)
        assert code == 0, out + err
    assert cli("generate", REPO, PROMPT, *FLAGS, "--out", "after.png")[0] == 0
    before, after = (Image.open(tmp_path / f"{name}.png") for name in ("before", "after"))
    assert before.tobytes() == after.tobytes()  # the files name the model as it was asked for
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.faults = [Fault(".*", "cut", times=1000)]
    assert cli("generate", REPO, PROMPT, *FLAGS, "--out", "offline.png")[0] == 0


def test_the_folder_holds_what_was_verified(own: ExportFolder, tmp_path: Path) -> None:
    made = release(own, tmp_path)
    present = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file()}
    assert present == set(made.files)
    assert {"README.md", "SHA256SUMS", "export.json", "layer_00.data", "reports/parity.json"} <= present
    assert all(sha256_file(made.folder / path) == entry.sha256 for path, entry in made.files.items())
    statement = json.loads((made.folder / "reports" / "provenance.json").read_text())
    assert {s["name"] for s in statement["subject"]} == {"export.json", *own.manifest.files}
    asked = statement["predicate"]["buildDefinition"]["externalParameters"]
    assert (asked["recipe"]["name"], asked["target"]) == ("int8-24gb", "ort-test")
    build = CollectionRow.model_validate_json((made.folder / "reports" / "build.json").read_text())
    assert build.formats == ("onnxruntime", "fp32", "dense", "qdq")
    assert verify_folder(made.folder).faults == ()


def test_what_keeps_an_export_from_being_published(own: ExportFolder, tmp_path: Path) -> None:
    parity(own, ok=False, environment=ON_CPU).save(own.path)
    with pytest.raises(GateError, match=r"parity did not pass: case t2i_square: latent.path is 0.31"):
        release(own, tmp_path)
    parity(own, "0" * 64, environment=ON_CPU).save(own.path)
    with pytest.raises(GateError, match="belongs to another build"):
        release(own, tmp_path)
    (own.path / "reports" / "parity.json").unlink()
    with pytest.raises(GateError, match="no parity report"):
        release(own, tmp_path)
    tight = own.manifest.model_copy(update={"disk_limit": 1000.0})
    (own.path / "export.json").write_bytes(tight.to_bytes())
    with pytest.raises(GateError) as error:
        make_release(ExportFolder.open(own.path), tmp_path / "release", Origin(REPO, None))
    for missing in ("no parity report", "target ort-test allows 0.00 GB", "--base-model"):
        assert missing in str(error.value)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("name", ["layer_01.data", "gen_layer_02.onnx", "tokenizer.json"])
def test_a_changed_byte(own: ExportFolder, tmp_path: Path, name: str) -> None:
    flip(own.path / name, 300)
    for draft in (False, True):
        with pytest.raises(GateError, match=f"{name} was changed"):
            release(own, tmp_path, draft=draft)


def test_a_file_that_changes_while_it_is_published(hub: Hub, own: ExportFolder, publish: Publish) -> None:
    from bagel_compress.publishing.upload import upload

    made = release(own, own.path.parent)
    flip(made.folder / "layer_02.data", 9000)
    with pytest.raises(GateError, match=r"layer_02\.data was changed after it had been verified"):
        upload(made, REPO)
    assert not hub.store.repos[REPO].head("main").files.keys() & own.manifest.files.keys()


def test_engines_that_were_never_run_need_a_word_for_it(engines: ExportFolder, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"never run in the form .* on its graphs with onnxruntime .* with --unrun"):
        release(engines, tmp_path)
    made = release(engines, tmp_path, unrun=True)
    card = card_of(made)
    assert "> **Built, not run.** The engines were built with tensorrt-rtx and never run." in card.partition("\n## ")[0]
    assert "| **not run** |" in card
    assert "model-index" not in card  # figures of the graphs are no results of the engines
    assert "every engine was built by tensorrt-rtx, for sm89 | yes" in card
    assert made.reports.not_run != ()

    (engines.path / "reports" / "parity.json").unlink()
    with pytest.raises(GateError, match="no parity report"):
        release(engines, tmp_path, unrun=True)  # the word replaces no report
    parity(engines, ok=False, environment=ON_CPU).save(engines.path)
    with pytest.raises(GateError, match="parity did not pass"):
        release(engines, tmp_path, unrun=True)


def test_engines_that_were_run_need_no_word(engines: ExportFolder, tmp_path: Path) -> None:
    there = {"runtime": "tensorrt-rtx", "version": "1.7", "provider": "cuda", "precision": "bf16"}
    parity(engines, environment=there).save(engines.path)
    card = card_of(release(engines, tmp_path))
    assert "not run" not in card
    assert "by tensorrt-rtx 1.7 on cuda in bf16 | passed" in card


def test_a_report_that_does_not_say_what_was_run_counts_for_nothing(own: ExportFolder, tmp_path: Path) -> None:
    parity(own).save(own.path)
    with pytest.raises(GateError, match="was never run"):
        release(own, tmp_path)


def test_publishing_engines_on_the_command_line(
    hub: Hub, engines: ExportFolder, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("publish", engines.path, REPO, "--base-model", BASE)
    assert code == 1
    assert "--unrun" in err
    assert not hub.store.repos
    code, out, err = cli("publish", engines.path, REPO, "--base-model", BASE, "--unrun", "--json")
    assert code == 0, err
    receipt = json.loads(Path(json.loads(out)["receipts"][0]).read_text())
    assert "never run" in receipt["not_run"][0]
    assert receipt["parity_on"] == "onnxruntime 1.32 on cpu in fp32"


def test_the_card(own: ExportFolder, cli: Cli) -> None:
    code, card, _ = cli("card", own.path, REPO, "--base-model", BASE)
    assert code == 0
    assert "DRAFT" not in card
    assert "| `gen_layer` | 3 | `wrappers`, `latents`, `cos`, `sin`, `past_k`, `past_v` |" in card
    assert "by onnxruntime 1.32 on cpu in fp32 | passed" in card
    assert "| memory and speed on NVIDIA GeForce RTX 4090 | not measured |" in card
    assert "base_model_relation: quantized" in card
    assert "model-index" in card
    assert "- onnxruntime" in card
    (own.path / "reports" / "parity.json").unlink()
    assert "DRAFT" in cli("card", own.path, REPO)[1]


def test_graphs_for_a_card_that_ran_on_a_cpu_say_so(own: ExportFolder, tmp_path: Path) -> None:
    settings = own.manifest.settings.model_copy(update={"provider": "cuda"})
    (own.path / "export.json").write_bytes(own.manifest.model_copy(update={"settings": settings}).to_bytes())
    moved = ExportFolder.open(own.path)
    parity(moved, environment=ON_CPU).save(own.path)
    card = card_of(release(moved, tmp_path))
    assert "| The graphs were run on a CPU and never on a GPU. | **not run** |" in card


def test_a_repository_with_another_build_is_left_alone(
    hub: Hub, own: ExportFolder, artifact: Artifact, publish: Publish
) -> None:
    publish(artifact, REPO)
    with pytest.raises(PublishError, match="already holds another build"):
        publish(own, REPO)
    publish(own, REPO, replace=True)
    files = hub.store.repos[REPO].head("main").files
    assert "export.json" in files
    assert "manifest.json" not in files
    publish(own, REPO)  # the same again is no other build


def test_every_snippet_runs(
    hub: Hub, own: ExportFolder, publish: Publish, fresh_cache: Callable[[], Path], tmp_path: Path, cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    publish(own, REPO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(fresh_cache()))
    for snippet in export_snippets(own, REPO):
        if snippet.language == "sh":
            run_shell(snippet.text.replace("--out", "--steps 3 --size 64x64 --out"), cli)
            assert (tmp_path / "teapot.png").exists()
            continue
        command = [sys.executable, "-c", snippet.text]  # a process of its own, as a stranger has
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_an_export_is_no_model_for_torch(own: ExportFolder) -> None:
    from bagel_compress.errors import CheckpointError
    from bagel_compress.run.load import open_model

    with pytest.raises(CheckpointError, match="is an export; open it with"):
        open_model(own.path)


def test_a_hostile_manifest(own: ExportFolder) -> None:
    path = own.path / "export.json"
    data = json.loads(path.read_bytes())
    data["blocks"]["embed"]["data"] = "../secret.data"
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="not among its files"):
        ExportFolder.open(own.path)


def as_if(folder: ExportFolder, **settings: object) -> ExportFolder:
    """The same export as if it had been made with other settings and axes."""
    changed = folder.manifest.settings.model_copy(update=settings)
    axes = {"tokens": Range(min=1, opt=2, max=64)}
    return replace(folder, manifest=folder.manifest.model_copy(update={"settings": changed, "axes": axes}))


def test_only_engines_have_sizes_and_builders(own: ExportFolder) -> None:
    reports, _ = load_reports(own)
    graphs = export_card(own, reports, ORIGIN)
    engines = export_card(as_if(own, runtime="tensorrt-rtx"), reports, ORIGIN)
    sizes = " Engines accept these sizes: tokens 1 to 64."
    assert sizes in engines
    assert "Engines accept" not in export_card(as_if(own), reports, ORIGIN)
    assert "| every engine was built by tensorrt-rtx, for the GPU it was built on | yes |" in engines
    assert "every engine" not in graphs
    assert "  - onnxruntime" not in engines
    assert "- tensorrt\n" in engines
    assert "as ONNX graphs, one per block" in graphs
    assert "as TensorRT engines, and the graphs behind them, one per block" in engines


def test_what_was_not_run_is_said_in_words_that_fit(own: ExportFolder) -> None:
    def words(folder: ExportFolder) -> tuple[bool, tuple[str, ...]]:
        found = load_reports(folder)[0]
        return found.was_run, found.not_run

    by = "Their graphs and weights were run by onnxruntime 1.32 on cpu in fp32."
    assert words(own) == (True, ())
    assert words(as_if(own, precision="fp16")) == (
        False, (f"The graphs in fp16 were written and never run as they are. {by}",),
    )  # fmt: skip
    assert words(as_if(own, runtime="tensorrt")) == (
        False, (f"The engines were built with tensorrt and never run. {by}",),
    )  # fmt: skip
    assert words(as_if(own, provider="cuda")) == (True, ("The graphs were run on a CPU and never on a GPU.",))
    parity(own, environment=ON_CPU | {"provider": "cuda"}).save(own.path)
    assert words(as_if(own, provider="cuda")) == words(own) == (True, ())
    (own.path / "reports" / "parity.json").unlink()
    assert words(as_if(own, runtime="tensorrt")) == (
        False, ("The engines were built with tensorrt and never run. Nothing was run.",),
    )  # fmt: skip
