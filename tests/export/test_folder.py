"""The export folder: what is on disk, going on after an interruption, damage, and judging it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from export_targets import target
from interrupts import bury, calls_of, moments, sigint_at

from bagel.sampler import Sampler
from bagel_compress.errors import ArtifactError, ExportError
from bagel_compress.exporting import build
from bagel_compress.exporting.manifest import MANIFEST, ExportFolder
from bagel_compress.exporting.ort_sampler import open_onnx
from bagel_compress.exporting.source import WeightSource
from bagel_compress.run.case import load_cases
from bagel_compress.scores.evaluation_report import EvaluationReport, Score

ENDS = ("embed", "latent_out", "lm_head")


def test_each_weight_of_a_layer_is_once_on_disk(exported: ExportFolder, fp32: Sampler) -> None:
    und, gen = (exported.manifest.blocks[f"{kind}_layer_01"] for kind in ("und", "gen"))
    assert und.data == gen.data == "layer_01.data"
    assert und.weights.items() <= gen.weights.items()  # the same names at the same places
    assert len(gen.weights) == len(list(fp32.bagel.layers[1].parameters()))
    numbers = sum(p.numel() * 4 for p in fp32.bagel.layers[1].parameters())
    assert sum(w.bytes for w in gen.weights.values()) == numbers
    gaps = len(gen.weights) * 4096
    assert numbers <= exported.manifest.files["layer_01.data"].bytes < numbers + gaps


def test_graphs_are_standard_and_pass_the_checker(exported: ExportFolder) -> None:
    for name, entry in exported.manifest.blocks.items():
        path = exported.path / entry.model
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)], name
        assert [i.name for i in model.graph.input] == [p.name for p in entry.inputs]
        assert [o.name for o in model.graph.output] == [p.name for p in entry.outputs]
        assert b"/work" not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()
    nodes = exported.manifest.blocks["gen_layer_00"].nodes
    assert (nodes["Attention"], nodes["RMSNormalization"], nodes["RotaryEmbedding"]) == (1, 8, 4)
    assert not {"GatherND", "ScatterND"} & nodes.keys()


def test_nodes_are_named_after_what_they_read(exported: ExportFolder) -> None:
    for name, entry in exported.manifest.blocks.items():
        names = [n.name for n in onnx.load(exported.path / entry.model, load_external_data=False).graph.node]
        assert len(set(names)) == len(names), name
    nodes = onnx.load(exported.path / "gen_layer_00.onnx", load_external_data=False).graph.node
    kinds = {n.name: n.op_type for n in nodes}
    assert (kinds["gen.o_proj"], kinds["und.q_proj.bias"]) == ("MatMul", "Add")
    assert kinds["gen.input_layernorm"] == "RMSNormalization"


def test_axes_are_named(exported: ExportFolder) -> None:
    model = onnx.load(exported.path / "und_layer_00.onnx", load_external_data=False)
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert shapes["x"] == ["tokens", 64]
    assert shapes["past_k"] == [1, 2, "past_tokens", 16]


def test_an_interrupted_export_goes_on(
    tiny: Path, exported: ExportFolder, tmp_path: Path, templates: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = build.write_group

    def stops(job: build.Job, data: str, blocks: list, note: Path) -> None:  # type: ignore[type-arg]
        if data == "layer_01" and not written.count("layer_01"):
            written.append(data)
            raise KeyboardInterrupt
        written.append(data)
        real(job, data, blocks, note)

    monkeypatch.setattr(build, "write_group", stops)
    wanted = target(blocks=("und_layer", "gen_layer"))
    with pytest.raises(KeyboardInterrupt):
        build.export(WeightSource.open(tiny), wanted, tmp_path / "o", templates=templates)
    with pytest.raises(ArtifactError, match="did not finish"):
        ExportFolder.open(tmp_path / "o")
    with pytest.raises(ExportError, match="unfinished export of something else"):
        build.export(WeightSource.open(tiny), target(blocks=("embed",)), tmp_path / "o", templates=templates)
    folder = build.export(WeightSource.open(tiny), wanted, tmp_path / "o", templates=templates)
    assert written == ["layer_00", "layer_01", "layer_01", "layer_02"]
    for name in ("layer_00.data", "gen_layer_02.onnx"):
        assert folder.manifest.files[name] == exported.manifest.files[name]
    assert not (tmp_path / "o" / ".export").exists()


def test_damage_is_found(tiny: Path, make: Callable[..., ExportFolder]) -> None:
    folder = make(WeightSource.open(tiny), blocks=ENDS)
    assert folder.verify() == []
    data = folder.path / "lm_head.data"
    content = bytearray(data.read_bytes())
    content[500] ^= 1
    data.write_bytes(content)
    assert ExportFolder.open(folder.path).verify() == ["lm_head.data was changed"]
    data.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"lm_head\.data has \d+ bytes, the manifest says"):
        ExportFolder.open(folder.path)
    text = (folder.path / MANIFEST).read_text().replace('"lm_head.data": {', '"../lm_head.data": {')
    (folder.path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="points outside its folder"):
        ExportFolder.open(folder.path)


def test_a_trusted_export_is_not_compared(
    exported: ExportFolder, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    """What opening compares, and what --trust leaves out; verify always compares."""
    folder = tmp_path / "damaged"
    shutil.copytree(exported.path, folder)
    data = bytearray((folder / "layer_01.data").read_bytes())
    data[4] ^= 1  # a mantissa's last bit
    (folder / "layer_01.data").write_bytes(data)
    command = ("generate", folder, "a", "--steps", "2", "--size", "32x32", "--out", tmp_path / "x.png")
    code, _, err = cli(*command)
    assert code == 2
    assert "layer_01.data is not what the manifest says" in err
    code, _, err = cli(*command, "--trust")
    assert code == 0, err
    assert f"{folder}: its bytes are not compared with its manifest (--trust)" in err
    assert (tmp_path / "x.png").exists()
    assert ExportFolder.open(folder, trust=True).verify() == ["layer_01.data was changed"]


def test_inspect_says_what_an_export_is(
    exported: ExportFolder, tiny: Path, make: Callable[..., ExportFolder], cli: Callable[..., tuple[int, str, str]]
) -> None:
    import json

    code, out, _ = cli("inspect", exported.path, "--verify", "--json")
    found = json.loads(out)
    assert (code, found["kind"], found["opset"], found["verified"]) == (0, "export", 23, True)
    assert found["bytes"] == sum(p.stat().st_size for p in exported.path.glob("*") if p.name in exported.manifest.files)
    kinds = {k["kind"]: k for k in found["kinds"]}
    assert (kinds["gen_layer"]["blocks"], kinds["gen_layer"]["forms"]) == (3, {"dense": 42})
    assert kinds["und_layer"]["reads"] * 2 == kinds["gen_layer"]["reads"]
    assert {"onnx", "torch", "onnxruntime"} <= found["versions"].keys()
    assert found["profiles"]["tokens"]["min"] == 1
    code, out, _ = cli("inspect", exported.path, "--tensors")
    assert code == 0
    assert "gen_layer_02 14 dense" in out
    assert exported.digest[:12] in out

    folder = make(WeightSource.open(tiny), blocks=ENDS)
    (folder.path / "latent_out.data").unlink()
    (folder.path / "notes.txt").write_text("x")
    code, _, err = cli("inspect", folder.path, "--verify")
    assert code == 1
    assert "latent_out.data is missing" in err
    assert "notes.txt is not in the manifest" in err
    assert cli("inspect", folder.path)[0] == 2


def test_more_than_the_target_allows(tiny: Path, tmp_path: Path, templates: dict[str, bytes]) -> None:
    wanted = target(blocks=("latent_out",))
    tight = wanted.model_copy(update={"budget": wanted.budget.model_copy(update={"disk_gb": 1e-6})})
    folder = build.export(WeightSource.open(tiny), tight, tmp_path / "o", templates=templates)
    assert len(folder.over_disk) == 1
    assert "target test allows 0.00 GB" in folder.over_disk[0]


def test_some_blocks_are_no_model(tiny: Path, make: Callable[..., ExportFolder]) -> None:
    folder = make(WeightSource.open(tiny), blocks=ENDS)
    with pytest.raises(ExportError, match="is not a complete model: it has no gen_layer"):
        open_onnx(folder.path)


def test_other_peoples_folders_are_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty and holds no export"):
        build.export(WeightSource.open(tiny), target(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_a_target_without_export_is_an_error(tiny: Path, tmp_path: Path) -> None:
    plain = target().model_copy(update={"export": None})
    with pytest.raises(ExportError, match="target test has no `export` section"):
        build.export(WeightSource.open(tiny), plain, tmp_path / "o")


def test_bf16_is_refused_on_the_cpu(tiny: Path, make: Callable[..., ExportFolder]) -> None:
    folder = make(WeightSource.open(tiny), blocks=("embed",), precision="bf16")
    with pytest.raises(ExportError, match="bf16, which onnxruntime cannot compute on CPU"):
        open_onnx(folder.path)


def test_weights_beyond_fp16_stop_the_export(tiny: Path, make: Callable[..., ExportFolder]) -> None:
    source = WeightSource.open(tiny)
    real = source.tensor
    source.tensor = lambda path: real(path).clone().fill_(1e6)  # type: ignore[method-assign]
    with pytest.raises(ExportError, match=r"norm_moe_gen\.weight: 9.994e\+05 is beyond fp16"):
        make(source, blocks=("latent_out",), precision="fp16")


def test_the_graphs_pass_the_validation_of_artifacts(
    exported: ExportFolder, tiny: Path, tmp_path: Path, small_cases: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    import torch

    from bagel_compress.validation.artifact import record_source
    from bagel_compress.validation.export import validate_export

    cases = load_cases([small_cases])
    file = record_source(tiny, cases, tmp_path / "t.safetensors", dtype=torch.float32, floors=("repeat", "kernel"))
    report = validate_export(exported, [file.path], threads=1)
    assert report.passed, [*report.faults, *report.broken]
    assert (exported.path / "reports" / "parity.json").is_file()
    assert exported.verify() == []

    page = exported.path / "report.html"
    before = page.read_text(encoding="utf-8")
    figure = {"value": 81.2, "low": 79.0, "high": 83.4, "units": 553}
    EvaluationReport(
        benchmark="geneval", title="GenEval", model="fp32", digest=exported.digest, measured_by="x", measured_on="y",
        items=240, differs=(), skipped=(), scores=(Score(name="overall", **figure),),
    ).attach(exported.path)  # fmt: skip
    code, out, _ = cli("report", exported.path)
    assert (code, out.strip()) == (0, str(page))
    after = page.read_text(encoding="utf-8")
    assert "81.20 (79.00 to 83.40)" in after
    (exported.path / "reports" / "evaluation-geneval.json").unlink()
    assert cli("report", exported.path)[0] == 0
    assert page.read_text(encoding="utf-8") == before


def test_a_finished_export_is_given_back_and_a_locked_one_is_left_alone(
    tiny: Path, tmp_path: Path, templates: dict[str, bytes]
) -> None:
    source, wanted, out = WeightSource.open(tiny), target(blocks=("embed",)), tmp_path / "o"
    made = build.export(source, wanted, out, templates=templates)
    assert build.export(source, wanted, out, templates=templates).digest == made.digest
    with pytest.raises(ExportError, match="finished export of something else"):
        build.export(source, target(blocks=("lm_head",)), out, templates=templates)
    (tmp_path / "p" / ".export").mkdir(parents=True)
    (tmp_path / "p" / ".export" / "lock").write_text('{"pid": 1, "host": "elsewhere", "started": ""}')
    with pytest.raises(ExportError, match="is being exported by process 1 on elsewhere"):
        build.export(source, wanted, tmp_path / "p", templates=templates)


def test_an_export_that_ends_at_any_file_goes_on(
    tiny: Path, tmp_path: Path, templates: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wanted = WeightSource.open(tiny), target(blocks=("embed",))
    whole = build.export(source, wanted, tmp_path / "whole", templates=templates)
    replace, left = os.replace, [0]

    def stops(one: Path, other: Path) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(one, other)

    for count in range(2, len(whole.manifest.files) + 4, 3):
        out, left[0] = tmp_path / f"stopped{count}", count
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stops)
            with suppress(KeyboardInterrupt):
                build.export(source, wanted, out, templates=templates)
        assert build.export(source, wanted, out, templates=templates).digest == whole.digest
        assert not list(out.rglob("*.partial")) + list(out.glob(".export"))


@pytest.mark.parametrize("count", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_moment_and_again(
    count: int, tiny: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    text = "name: one\ndevice: {name: a GPU, memory_mib: 8000}\nexport: {blocks: [embed]}\nbudget: {disk_gb: 1}\n"
    (tmp_path / "one.yaml").write_text(text)
    command = ("export", tiny, tmp_path / "one.yaml", "--out")
    (code, _, err), calls = calls_of(lambda: cli(*command, tmp_path / "whole"))
    assert code == 0, err
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    for call in moments(calls, count, 5):
        out = tmp_path / f"stopped{call}"
        with sigint_at(call):
            code, _, err = cli(*command, out)
        assert code in (0, 130), err
        assert "Traceback" not in err
        bury(out / ".export" / "lock")
        code, _, err = cli(*command, out)
        assert code == 0, (call, err)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == expected, call


def test_an_export_is_held_to_the_presets_of_its_recipe(
    exported: ExportFolder, tiny: Path, tmp_path: Path, small_cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from bagel_compress.build.recipe import Recipe
    from bagel_compress.build.speed_settings import SpeedPreset
    from bagel_compress.errors import ArtifactError
    from bagel_compress.exporting.manifest import ExportManifest
    from bagel_compress.run.presets import presets_of
    from bagel_compress.validation.artifact import record_source
    from bagel_compress.validation.export import validate_export

    recipe = Recipe.parse("name: a\nrules: [{match: {}, codec: raw}]\nfast: {fast: {cache_every: 2}}\n", "a")
    source = exported.manifest.source.model_copy(update={"recipe": recipe})
    promised = exported.manifest.model_copy(update={"source": source})
    assert promised.presets == {"fast": SpeedPreset(cache_every=2)}
    assert exported.manifest.presets == {}
    presets = {"exact": SpeedPreset(), "fast": SpeedPreset(num_timesteps=2)}
    monkeypatch.setattr(ExportManifest, "presets", property(lambda self: presets))
    cases = load_cases([small_cases])
    file = record_source(tiny, cases, tmp_path / "t.safetensors", dtype=torch.float32, floors=("repeat",))
    report = validate_export(exported, [file.path], threads=1)
    found = {name: [row for row in report.rows if row.case.endswith(f"preset {name}")] for name in presets}
    assert all(row.limit is not None for rows in found.values() for row in rows)
    worst = {name: max(row.value for row in rows if row.metric == "latent.path") for name, rows in found.items()}
    assert worst["exact"] < 1e-4 < worst["fast"]
    folder = tmp_path / "promised"
    folder.mkdir()
    (folder / build.MANIFEST).write_bytes(promised.to_bytes())
    assert presets_of(folder) == {"fast": SpeedPreset(cache_every=2)}
    (folder / build.MANIFEST).write_text('{"source": 3}')
    with pytest.raises(ArtifactError, match="is damaged"):
        presets_of(folder)
