"""Exports a source for a target into a folder, one data file at a time.

A data file is written before the graphs that refer to it; each weight is written once (und_layer and gen_layer of a
layer share a data file). Memory holds one matrix and its transpose. A file gets its final name when it is complete. A
record per finished data file, under .export/, lets an interrupted export continue; the manifest is written last, and
then the records are removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from bagel_compress.build.manifest import FileEntry
from bagel_compress.errors import ExportError
from bagel_compress.exporting.blocks import all_blocks
from bagel_compress.exporting.graph import OPSET
from bagel_compress.exporting.manifest import (
    MANIFEST,
    UNFINISHED,
    BlockEntry,
    ExportFolder,
    ExportManifest,
    config_dict,
)
from bagel_compress.exporting.profiles import axis_ranges
from bagel_compress.exporting.source import FOLDER_FILES, WeightSource
from bagel_compress.exporting.tensorrt import check_settings, load_tensorrt
from bagel_compress.exporting.write import ExportJob, file_entry, plan_forms, write_atomic, write_group
from bagel_compress.io.atomic import PARTIAL
from bagel_compress.io.lock import take_lock
from bagel_compress.run.export_settings import BlockKind, ExportSettings
from bagel_compress.run.target import Target

PACKAGES = ("bagel-compress", "torch", "onnx", "onnxscript", "onnxruntime", "tensorrt_rtx")
LOCK, IDENTITY = "lock", "identity.json"  # files in the folder UNFINISHED
Progress = Callable[[str, int, int], None]  # (name of the data file, data files done, data files in all)


def export(
    source: WeightSource,
    target: Target,
    out: Path,
    progress: Progress | None = None,
    templates: dict[str, bytes] | None = None,
) -> ExportFolder:
    """Writes the export folder `out`, or continues an interrupted export of the same source and target.

    A finished export of the same source for the same target is opened and returned unchanged. `templates` caches traced
    graphs between exports of one model configuration. Before any weight is written, raises ExportError if the target
    has no `export` section, if its settings contradict each other, if a codec has no form in the runtime, and if `out`
    holds something else or another process is writing to it; MissingExtraError if the runtime's package is missing.
    """
    if target.export is None:
        raise ExportError(
            f"target {target.name} has no `export` section; choose one such as ort-cpu or trt-rtx4090-24gb."
        )
    if (out / MANIFEST).exists():
        return _finished(source, target, out)
    begun = _was_begun(source, target, out)
    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    take_lock(out / UNFINISHED / LOCK, "exported", ExportError)
    try:
        return _export(source, target, target.export, out, {} if templates is None else templates, begun, progress)
    finally:
        (out / UNFINISHED / LOCK).unlink(missing_ok=True)


def _export(
    source: WeightSource,
    target: Target,
    settings: ExportSettings,
    out: Path,
    templates: dict[str, bytes],
    begun: bool,
    progress: Progress | None,
) -> ExportFolder:
    for leftover in out.glob(f"*{PARTIAL}"):
        leftover.unlink()
    try:
        job = _planned(source, target, settings, out, templates)
    except BaseException:
        if not begun:
            shutil.rmtree(out)
        raise
    write_atomic(out / UNFINISHED / IDENTITY, json.dumps(_identity(source, target)).encode())
    groups = list(job.groups())
    for done, (data, blocks) in enumerate(groups):
        if progress:
            progress(data, done, len(groups))
        record = out / UNFINISHED / f"{data}.json"
        if not record.exists():
            write_group(job, data, blocks, record)
    return _finish(job, target)


def _identity(source: WeightSource, target: Target) -> dict[str, Any]:
    return {"source": source.identity.digest, "target": target.model_dump(mode="json"), "opset": OPSET}


def _was_begun(source: WeightSource, target: Target, out: Path) -> bool:
    """Whether `out` holds an unfinished export of this source and target. Raises ExportError on anything else."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; choose a folder for the export.")
    if out.exists() and any(out.iterdir()) and not (out / UNFINISHED).exists():
        raise ExportError(f"{out} is not empty and holds no export; choose an empty folder.")
    identity = out / UNFINISHED / IDENTITY
    if not identity.exists():
        return False
    if json.loads(identity.read_text(encoding="utf-8")) != _identity(source, target):
        raise ExportError(f"{out} holds an unfinished export of something else; remove it or choose another folder.")
    return True


def _finished(source: WeightSource, target: Target, out: Path) -> ExportFolder:
    """The finished export in `out`. Raises ExportError if it is of another source or target."""
    folder = ExportFolder.open(out)
    made = folder.manifest
    same = (made.source, made.target, made.settings, made.opset, made.disk_limit) == (
        source.identity, target.name, target.export, OPSET, target.disk_limit,
    )  # fmt: skip
    if not same:
        raise ExportError(f"{out} already holds a finished export of something else; choose another folder.")
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # still there if the process died after writing the manifest
    return folder


def _planned(
    source: WeightSource, target: Target, settings: ExportSettings, out: Path, templates: dict[str, bytes]
) -> ExportJob:
    """The export with all checks done that need no weights. Copies the config and tokenizer files."""
    source.copy_files(out)
    config, vae = source.configs(out)
    wanted = settings.blocks or get_args(BlockKind)
    blocks = [b for b in all_blocks(config, vae) if b.kind in wanted]
    plan_forms(source, settings, blocks)
    if settings.runtime != "onnxruntime":
        load_tensorrt(settings.runtime)
        paths = {path for b in blocks if not b.in_fp32 for path in b.weights.values()}
        check_settings(settings, [source.codec(path) for path in sorted(paths)])
    return ExportJob(source, settings, axis_ranges(target.sizes, config, settings.axes), out, blocks, templates)


def _finish(job: ExportJob, target: Target) -> ExportFolder:
    records = [json.loads((job.out / UNFINISHED / f"{d}.json").read_text(encoding="utf-8")) for d, _ in job.groups()]
    files = {name: entry for record in records for name, entry in record["files"].items()}
    for name in FOLDER_FILES:
        if (job.out / name).is_file():
            files[name] = file_entry(job.out / name).model_dump()
    config, _ = job.source.configs(job.out)
    manifest = ExportManifest(
        tool=f"bagel-compress {version('bagel-compress')}",
        versions=versions(),
        source=job.source.identity,
        limits=job.source.limits,
        target=target.name,
        device=target.device.name,
        disk_limit=target.disk_limit,
        settings=job.settings,
        axes=dict(job.axes),
        opset=OPSET,
        config=config_dict(config),
        blocks={name: BlockEntry.model_validate(b) for record in records for name, b in record["blocks"].items()},
        files={name: FileEntry.model_validate(files[name]) for name in sorted(files)},
    )
    write_atomic(job.out / MANIFEST, manifest.to_bytes())
    shutil.rmtree(job.out / UNFINISHED)
    return ExportFolder.open(job.out)


def versions() -> dict[str, str]:
    """Package -> version, of the installed packages that make an export."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
