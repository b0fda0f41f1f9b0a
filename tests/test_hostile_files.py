"""Whatever is sent, a parser answers with the project's own error, soon, or takes it and can go on.

One fuzzer per parser, each with the structure of what it reads. A few hundred inputs in all here; `pytest -m slow` runs
10,000 each. `BAGEL_FUZZ=N` sets another number.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import as_text, flipped, hostile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bagel.errors import BagelError
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import find_recipe, resource, target_files
from bagel_compress.io.safetensors_file import TensorFile
from bagel_compress.source.checkpoint import Checkpoint

TINY = Path(__file__).parent / "data" / "golden" / "checkpoint"
CALIBRATION = Path(__file__).parents[1] / "bagel_compress" / "data" / "calibration" / "tiny.safetensors"
QUICK = int(os.environ.get("BAGEL_FUZZ", "25"))
SECONDS = 2.0  # of this process that one input may take


@cache
def place() -> Path:
    """A folder for all fuzzers, with a checkpoint and an artifact in it."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    shutil.copytree(TINY, folder / "checkpoint")
    checkpoint = Checkpoint.open(TINY)
    compress(make_plan(checkpoint, Recipe.load("nf4")), checkpoint, folder / "artifact")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _cleared() -> Iterator[None]:
    yield
    if place.cache_info().currsize:
        shutil.rmtree(place())


@contextmanager
def replaced(file: Path, content: bytes) -> Iterator[None]:
    """The file with another content, and as it was again."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        yield
    finally:
        file.unlink() if before is None else file.write_bytes(before)


def _checkpoint_file(name: str) -> Callable[[bytes], object]:
    def read(content: bytes) -> None:
        with replaced(place() / "checkpoint" / name, content):
            checkpoint = Checkpoint.open(place() / "checkpoint")
            make_plan(checkpoint, Recipe.load("nf4"))

    return read


def _config_that_runs(name: str) -> Callable[[bytes], object]:
    """What is taken is also run: a model is made of it."""

    def read(content: bytes) -> None:
        from bagel_compress.run.load import load_checkpoint

        with replaced(place() / "checkpoint" / name, content):
            load_checkpoint(Checkpoint.open(place() / "checkpoint"))

    return read


def _slow_tokenizer(content: bytes) -> None:
    """The tokenizer that vocab.json and merges.txt describe, as of a folder without tokenizer.json."""
    from bagel.text import TextCodec

    folder = place() / "checkpoint"
    files = {name: folder / name for name in ("vocab.json", "tokenizer_config.json")}
    with replaced(place() / "merges.txt", content):
        codec = TextCodec.from_files(files | {"merges.txt": place() / "merges.txt"}, folder)
        codec.answer(codec.turn("a red cat"))


def _header(content: bytes) -> None:
    file = place() / "header.safetensors"
    file.write_bytes(struct.pack("<Q", len(content)) + content + bytes(64))
    TensorFile.open(file)


def _whole_file(content: bytes) -> None:
    file = place() / "whole.safetensors"
    file.write_bytes(content)
    TensorFile.open(file)


def _manifest(content: bytes) -> None:
    with replaced(place() / "artifact" / MANIFEST, content):
        artifact = Artifact.open(place() / "artifact")
        artifact.snr(), artifact.groups(), artifact.weighted_errors()
        for unit in artifact.units()[:3]:
            artifact.decode(unit.name)


def _export(content: bytes) -> None:
    from bagel_compress.exporting.manifest import parse_export

    _ = parse_export(content, place()).model


def _yaml(load: Callable[[Path], object]) -> Callable[[bytes], object]:
    def read(content: bytes) -> None:
        file = place() / "input.yaml"
        file.write_bytes(content)
        load(file)

    return read


def _batch(file: Path) -> None:
    from bagel_compress.publishing.batch import BatchFile

    BatchFile.load(file).jobs()


def _adapter(content: bytes) -> None:
    from bagel_compress.source.adapter_config import AdapterConfig

    folder = place() / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(content)
    config = AdapterConfig.read(folder)
    config.scale("language_model.model.layers.0.self_attn.q_proj", 4)


def _trace(content: bytes) -> None:
    import torch
    from safetensors.torch import save

    from bagel_compress.parity.trace import METADATA_KEY, TraceFile

    file = place() / "trace.safetensors"
    text = content.decode("utf-8", "replace")
    file.write_bytes(save({"case/a/ids": torch.zeros(2)}, {METADATA_KEY: text.replace("\0", " ")}))
    opened = TraceFile.open(file)
    for case in opened.header.cases:
        opened.read(case)


def _parity(content: bytes) -> None:
    from bagel_compress.parity.report_data import REPORTS, ParityReport
    from bagel_compress.report.files import page_files

    folder = place() / "reported" / REPORTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parity.json").write_bytes(content)
    report = ParityReport.load(folder.parent)
    page_files(folder.parent, report, (), ())


def _budget(content: bytes) -> None:
    from bagel_compress.budgets.overruns import overruns
    from bagel_compress.parity.report_data import REPORTS, load_budgets
    from bagel_compress.report.memory_page import budget_section

    folder = place() / "budgeted" / REPORTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "budget-12gb.json").write_bytes(content)
    reports = load_budgets(folder.parent)
    budget_section(reports)
    _ = [overruns(report, None) for report in reports]


def _picture(content: bytes) -> None:
    from bagel.images import to_rgb
    from bagel_compress.io.pictures import read_picture

    file = place() / "picture"
    file.write_bytes(content)
    to_rgb(read_picture(file))


def _settings(content: bytes) -> None:
    from PIL import Image

    from bagel_compress.run.picture_settings import KEY, png_info, read_settings

    file, info = place() / "drawn.png", png_info({})
    info.chunks.clear()
    info.add_itxt(KEY, content.decode("utf-8", "replace").replace("\0", " "))
    Image.new("RGB", (4, 4)).save(file, pnginfo=info)
    found = read_settings(file)
    assert all(isinstance(found.get(part) or {}, dict) for part in ("flow", "thinking"))
    (found.get("flow") or {}).get("cfg_interval", [0.0, 1.0])[1]


def _calibration(content: bytes) -> None:
    from safetensors.torch import load_file, save_file

    from bagel_compress.calibrate.calibration_set import METADATA_KEY, CalibrationSet

    file = place() / "calibration.safetensors"
    save_file(load_file(CALIBRATION), file, {METADATA_KEY: content.decode("utf-8", "replace").replace("\0", " ")})
    CalibrationSet.open(file)


def _benchmark(content: bytes) -> None:
    from bagel_compress.evaluate.read_pictures import read_geneval

    folder = place() / "geneval"
    folder.mkdir(exist_ok=True)
    (folder / "evaluation_metadata.jsonl").write_bytes(content.replace(b"\n", b" ") + b"\n" + BENCHMARK_ROW)
    read_geneval(folder, 1)


def _sums(content: bytes) -> None:
    from bagel_compress.publishing.provenance import check_sums, subjects

    folder = place() / "released"
    (folder / "reports").mkdir(parents=True, exist_ok=True)
    (folder / "SHA256SUMS").write_bytes(content)
    (folder / "reports" / "provenance.json").write_bytes(content)
    subjects(folder)
    check_sums(folder)


def _json(name: str) -> Callable[[], Any]:
    return lambda: json.loads((TINY / name).read_text(encoding="utf-8"))


def _read_yaml(path: Callable[[], Path]) -> Callable[[], Any]:
    return lambda: yaml.safe_load(path().read_text(encoding="utf-8"))


def _header_of() -> Any:
    return {
        "__metadata__": {"format": "pt"}, "a": {"dtype": "BF16", "shape": [4, 4], "data_offsets": [0, 32]},
        "b": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]},
    }  # fmt: skip


def _manifest_of() -> Any:
    data = json.loads((place() / "artifact" / MANIFEST).read_bytes())
    keep = list(data["units"])
    chosen = [*keep[:2], next(n for n in keep if data["units"][n]["codec"]["format"] == "nf4")]
    return data | {"units": {name: data["units"][name] for name in chosen}}


def _export_of() -> Any:
    from bagel_compress.build.manifest import SourceEntry
    from bagel_compress.exporting.manifest import BlockEntry, ExportManifest, ExportSource, config_dict
    from bagel_compress.run.load import load_checkpoint

    config = load_checkpoint(Checkpoint.open(TINY)).bagel.config
    source = SourceEntry(name="x", revision="", digest="0" * 64, data_blake3="")
    block = BlockEntry(
        kind="embed", model="a.onnx", data="a.data", inputs=(), outputs=(), nodes={}, forms={}, weights={}
    )
    files = {name: {"bytes": 1, "blake3": "0"} for name in ("a.onnx", "a.data")}
    manifest = ExportManifest.model_validate({
        "tool": "x", "versions": {}, "source": ExportSource(kind="checkpoint", name="x", digest="0", checkpoint=source),
        "limits": {}, "target": "t", "device": "d", "disk_limit": None, "settings": {"runtime": "onnxruntime"},
        "axes": {}, "opset": 20, "config": config_dict(config), "blocks": {"embed": block}, "files": files,
    })  # fmt: skip
    return json.loads(manifest.to_bytes())


def _trace_of() -> Any:
    from bagel_compress.parity.trace import SAMPLER_VERSION, CaseFacts, TraceHeader

    case = {"name": "a", "kind": "chat", "turns": ["hello"]}
    return json.loads(
        TraceHeader.model_validate({
            "sampler": SAMPLER_VERSION, "source": "x", "source_digest": "0" * 64, "device": "cpu", "dtype": "bfloat16",
            "versions": {}, "model": {}, "cases": {"a": case}, "facts": {"a": CaseFacts()}, "tensors": {"a": ["ids"]},
        }).model_dump_json()
    )  # fmt: skip


def _parity_of() -> Any:
    case = {"name": "a", "kind": "t2i", "prompt": "p", "metrics": {"latent.path": 0.1}, "has_image": True}
    row = {"case": "a", "metric": "latent.path", "value": 0.1, "floor": None, "limit": 0.2, "source": "s", "ok": True}
    return {
        "artifact": "0" * 64, "name": "n", "level": "4-bit", "source": "s", "source_digest": "0", "environment": {},
        "rows": [row], "cases": [case], "shares": [{"component": "llm", "velocity": 0.1, "logits": None}],
        "modules": [{"module": "m", "codec": "nf4", "rel_l2": 0.1, "gain": 1.0}],
    }  # fmt: skip


def _budget_of() -> Any:
    return {
        "artifact": "0" * 64, "name": "n", "target": "12gb", "device": "d", "limit": 1e9, "disk": 1.0,
        "phases": [{"name": "t2i: denoise", "parts": {"caches": 1.0}, "measured": None}], "disk_limit": 2.0,
        "timings": [{"what": "image", "median": 1.0, "p90": 1.1, "reference": 2.0}],
    }  # fmt: skip


def _settings_of() -> Any:
    from bagel.settings import FlowSettings, TextSettings
    from bagel_compress.run.picture_settings import picture_settings

    return json.loads(json.dumps(picture_settings("m", "a red cat", 1, (64, 32), FlowSettings(), TextSettings())))


def _calibration_of() -> Any:
    from safetensors import safe_open

    from bagel_compress.calibrate.calibration_set import METADATA_KEY

    with safe_open(str(CALIBRATION), framework="numpy") as whole:
        return json.loads(whole.metadata()[METADATA_KEY])


BENCHMARK_ROW = b'{"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": "a red cat"}'
ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2},
    "alpha_pattern": {}, "bias": "none", "base_model_name_or_path": "x", "modules_to_save": None, "use_rslora": False,
}  # fmt: skip

BATCH = {"out": "out", "sources": [{"name": "a", "path": "x"}], "recipes": ["nf4"]}


def _picture_bytes() -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.linear_gradient("L").resize((40, 24)).convert("RGBA").save(data, "PNG")
    return data.getvalue()


def _targets(name: str) -> Callable[[], Path]:
    return lambda: target_files()[name]


def _case_file() -> Path:
    return resource("exports") / "cases" / "edit.yaml"


def _load_target(file: Path) -> object:
    from bagel_compress.run.target import Target

    return Target.load(file)


def _load_case(file: Path) -> object:
    from bagel_compress.run.case import Case

    return Case.load(file)


def _whole_file_of() -> bytes:
    header = as_text(_header_of())
    return struct.pack("<Q", len(header)) + header + bytes(64)


# Parser: what it is given, and what it starts from.
JSON_PARSERS: dict[str, tuple[Callable[[bytes], object], Callable[[], Any]]] = {
    "safetensors header": (_header, _header_of),
    "llm_config.json": (_config_that_runs("llm_config.json"), _json("llm_config.json")),
    "vit_config.json": (_config_that_runs("vit_config.json"), _json("vit_config.json")),
    "config.json": (_config_that_runs("config.json"), _json("config.json")),
    "tokenizer.json": (_checkpoint_file("tokenizer.json"), _json("tokenizer.json")),
    "tokenizer_config.json": (_checkpoint_file("tokenizer_config.json"), _json("tokenizer_config.json")),
    "manifest.json": (_manifest, _manifest_of),
    "export.json": (_export, _export_of),
    "recipe": (_yaml(Recipe.load), _read_yaml(lambda: find_recipe("nf4-12gb"))),
    "target": (_yaml(_load_target), _read_yaml(_targets("trt-rtx4090-24gb"))),
    "case": (_yaml(_load_case), _read_yaml(_case_file)),
    "batch": (_yaml(_batch), lambda: BATCH),
    "adapter": (_adapter, lambda: ADAPTER),
    "trace": (_trace, _trace_of),
    "calibration set": (_calibration, _calibration_of),
    "settings of a picture": (_settings, _settings_of),
    "row of a benchmark": (_benchmark, lambda: json.loads(BENCHMARK_ROW)),
    "parity report": (_parity, _parity_of),
    "budget report": (_budget, _budget_of),
}
BYTE_PARSERS: dict[str, tuple[Callable[[bytes], object], Callable[[], bytes]]] = {
    "safetensors file": (_whole_file, _whole_file_of),
    "picture": (_picture, _picture_bytes),
    "merges.txt": (_slow_tokenizer, lambda: (TINY / "merges.txt").read_bytes()),
    "SHA256SUMS": (_sums, lambda: b"0" * 64 + b"  a/b.safetensors\n" + b"1" * 64 + b"  manifest.json\n"),
}
"""A file of bytes is damaged at random places."""


def inputs(name: str) -> tuple[Callable[[bytes], object], bytes, st.SearchStrategy[bytes]]:
    """The parser, a file that it takes, and damaged ones."""
    if name in JSON_PARSERS:
        read, start = JSON_PARSERS[name]
        return read, as_text(start()), hostile(start())
    read, content = BYTE_PARSERS[name]
    return read, content(), flipped(content())


def fuzz(name: str, count: int) -> None:
    place()
    read, whole, contents = inputs(name)
    options = settings(
        max_examples=count, deadline=None, database=None, derandomize=count == QUICK,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    read(whole)  # taken as it is; imports are not the parser's time

    @options
    @given(contents)
    def run(content: bytes) -> None:
        begun = time.process_time()
        with suppress(BagelError):
            read(content)
        assert time.process_time() - begun < SECONDS

    run()


@pytest.mark.parametrize("name", [*JSON_PARSERS, *BYTE_PARSERS])
def test_a_damaged_file_is_taken_or_refused(name: str) -> None:
    fuzz(name, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*JSON_PARSERS, *BYTE_PARSERS])
def test_ten_thousand_damaged_files(name: str) -> None:
    fuzz(name, 10_000)
