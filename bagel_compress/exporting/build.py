"""From a source and a target to an export folder, one data file at a time.

Per data file: every weight is written once (und_layer and gen_layer of a layer share one), then the graphs that refer
to it. Memory holds one matrix and its turned copy. Files appear under their names when complete; a note per data file
under .export/ lets an interrupted export go on; the manifest comes last and the notes go away.
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
    NOTES,
    BlockEntry,
    ExportFolder,
    ExportManifest,
    config_dict,
)
from bagel_compress.exporting.profiles import axes_of
from bagel_compress.exporting.source import FOLDER_FILES, WeightSource
from bagel_compress.exporting.tensorrt import check_settings, load_tensorrt
from bagel_compress.exporting.write import ExportJob, file_entry, plan_forms, write_atomic, write_group
from bagel_compress.io.atomic import PARTIAL
from bagel_compress.io.lock import take_lock
from bagel_compress.run.export_settings import BlockKind, ExportSettings
from bagel_compress.run.target import Target

PACKAGES = ("bagel-compress", "torch", "onnx", "onnxscript", "onnxruntime", "tensorrt_rtx")
LOCK, IDENTITY = "lock", "identity.json"  # in the notes
Progress = Callable[[str, int, int], None]  # data file, done, all


def export(
    source: WeightSource,
    target: Target,
    out: Path,
    progress: Progress | None = None,
    templates: dict[str, bytes] | None = None,
) -> ExportFolder:
    """Writes the folder, or goes on where an interrupted export stopped.

    A finished export of the same source for the same target is given back as it is. `templates` keeps graphs between
    exports of one model configuration. Raises ExportError, before anything is written, if the target says nothing of an
    export, if it asks for what cannot be, if a codec cannot be carried, and if `out` holds something else or another
    process writes to it; MissingExtraError if the runtime's package is not installed.
    """
    if target.export is None:
        raise ExportError(
            f"target {target.name} has no `export` section; choose one such as ort-cpu or trt-rtx4090-24gb."
        )
    if (out / MANIFEST).exists():
        return _finished(source, target, out)
    begun = _expect_own(source, target, out)
    (out / NOTES).mkdir(parents=True, exist_ok=True)
    take_lock(out / NOTES / LOCK, "exported", ExportError)
    try:
        return _export(source, target, target.export, out, {} if templates is None else templates, begun, progress)
    finally:
        (out / NOTES / LOCK).unlink(missing_ok=True)


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
    write_atomic(out / NOTES / IDENTITY, json.dumps(_identity(source, target)).encode())
    groups = list(job.groups())
    for done, (data, blocks) in enumerate(groups):
        if progress:
            progress(data, done, len(groups))
        note = out / NOTES / f"{data}.json"
        if not note.exists():
            write_group(job, data, blocks, note)
    return _finish(job, target)


def _identity(source: WeightSource, target: Target) -> dict[str, Any]:
    return {"source": source.identity.digest, "target": target.model_dump(mode="json"), "opset": OPSET}


def _expect_own(source: WeightSource, target: Target, out: Path) -> bool:
    """Whether this export was begun in `out`. Raises ExportError if the folder holds something else."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; choose a folder for the export.")
    if out.exists() and any(out.iterdir()) and not (out / NOTES).exists():
        raise ExportError(f"{out} is not empty and holds no export; choose an empty folder.")
    note = out / NOTES / IDENTITY
    if not note.exists():
        return False
    if json.loads(note.read_text(encoding="utf-8")) != _identity(source, target):
        raise ExportError(f"{out} holds an unfinished export of something else; remove it or choose another folder.")
    return True


def _finished(source: WeightSource, target: Target, out: Path) -> ExportFolder:
    """The finished export in `out`, if it is this one. Raises ExportError otherwise."""
    folder = ExportFolder.open(out)
    made = folder.manifest
    same = (made.source, made.target, made.settings, made.opset, made.disk_limit) == (
        source.identity, target.name, target.export, OPSET, target.disk_limit,
    )  # fmt: skip
    if not same:
        raise ExportError(f"{out} already holds a finished export of something else; choose another folder.")
    shutil.rmtree(out / NOTES, ignore_errors=True)  # killed between the manifest and the clearing
    return folder


def _planned(
    source: WeightSource, target: Target, settings: ExportSettings, out: Path, templates: dict[str, bytes]
) -> ExportJob:
    """Everything that can fail before weights are read."""
    source.copy_files(out)
    config, vae = source.configs(out)
    wanted = settings.blocks or get_args(BlockKind)
    blocks = [b for b in all_blocks(config, vae) if b.kind in wanted]
    plan_forms(source, settings, blocks)
    if settings.runtime != "onnxruntime":
        load_tensorrt(settings.runtime)
        paths = {path for b in blocks if not b.in_fp32 for path in b.weights.values()}
        check_settings(settings, [source.codec(path) for path in sorted(paths)])
    return ExportJob(source, settings, axes_of(target.sizes, config, settings.axes), out, blocks, templates)


def _finish(job: ExportJob, target: Target) -> ExportFolder:
    notes = [json.loads((job.out / NOTES / f"{data}.json").read_text(encoding="utf-8")) for data, _ in job.groups()]
    files = {name: entry for note in notes for name, entry in note["files"].items()}
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
        blocks={name: BlockEntry.model_validate(b) for note in notes for name, b in note["blocks"].items()},
        files={name: FileEntry.model_validate(files[name]) for name in sorted(files)},
    )
    write_atomic(job.out / MANIFEST, manifest.to_bytes())
    shutil.rmtree(job.out / NOTES)
    return ExportFolder.open(job.out)


def versions() -> dict[str, str]:
    """Versions of the packages that made the files."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
