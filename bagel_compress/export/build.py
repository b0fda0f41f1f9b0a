"""From a source and settings to an export folder, one data file at a time.

Per data file: every weight is written once (und_layer and gen_layer of a layer share one), then the graphs that refer
to it. Memory holds one matrix and its turned copy. Files appear under their names when complete; a note per data file
under .export/ lets an interrupted export go on; the manifest comes last and the notes go away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from bagel_compress.errors import ExportError
from bagel_compress.export.blocks import Block, all_blocks, matrices
from bagel_compress.export.forms import FormName, Stored, coded, elem_type, form_of, plain, rewrite
from bagel_compress.export.graph import OPSET, template
from bagel_compress.export.manifest import (
    MANIFEST,
    BlockEntry,
    ExportFolder,
    ExportManifest,
    FileEntry,
    PortEntry,
    WeightEntry,
    config_dict,
    file_sha256,
)
from bagel_compress.export.source import FOLDER_FILES, VAE_PREFIX, Source
from bagel_compress.runtime import TORCH_NAMES, BlockKind, ExportSettings

if TYPE_CHECKING:
    import onnx
    import torch

NOTES = ".export"
ALIGN = 4096  # offsets in data files: page-aligned, so that runtimes can map each weight
PACKAGES = ("bagel-compress", "torch", "onnx", "onnxscript", "onnxruntime", "tensorrt_rtx")
Progress = Callable[[str, int, int], None]  # data file, done, all


@dataclass
class Job:
    """One export: what is exported, how, and the templates made so far."""

    source: Source
    settings: ExportSettings
    out: Path
    blocks: list[Block]
    templates: dict[str, bytes]  # serialised, by kind and precision

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, TORCH_NAMES[self.settings.precision])
        return dtype

    def groups(self) -> Iterator[tuple[str, list[Block]]]:
        """Data file stem -> its blocks."""
        for data in dict.fromkeys(b.data for b in self.blocks):
            yield data, [b for b in self.blocks if b.data == data]


def export(
    source: Source,
    settings: ExportSettings,
    target: str,
    out: Path,
    progress: Progress | None = None,
    templates: dict[str, bytes] | None = None,
) -> ExportFolder:
    """Writes the folder, or goes on where an interrupted export stopped.

    `templates` keeps graphs between exports of one model configuration. Raises ExportError before anything is written
    if a codec cannot be carried, and if `out` holds something else.
    """
    if (out / MANIFEST).exists():
        raise ExportError(f"{out} already holds a finished export; choose another folder or remove it.")
    job = _begin(source, settings, target, out, {} if templates is None else templates)
    groups = list(job.groups())
    for done, (data, blocks) in enumerate(groups):
        if progress:
            progress(data, done, len(groups))
        note = out / NOTES / f"{data}.json"
        if not note.exists():
            _write_group(job, data, blocks, note)
    return _finish(job, target)


def plan_forms(source: Source, settings: ExportSettings, blocks: Sequence[Block]) -> dict[str, FormName]:
    """Matrix by its path in Bagel -> form. Raises ExportError for the first that cannot be carried."""
    forms: dict[str, FormName] = {}
    seen: set[str] = set()
    by_kind = {b.kind: matrices(b) for b in {b.kind: b for b in blocks}.values()}
    for block in blocks:
        for name in by_kind[block.kind]:
            path = block.weights[name]
            if path not in seen and not block.wide:
                seen.add(path)
                forms[path] = form_of(source.codec(path), settings, source.official[path])
    return forms


# --- start and end ----------------------------------------------------------------------------------------------------


def _begin(source: Source, settings: ExportSettings, target: str, out: Path, templates: dict[str, bytes]) -> Job:
    identity = {"source": source.digest, "target": target, "settings": settings.model_dump(mode="json"), "opset": OPSET}
    note = out / NOTES / "identity.json"
    if out.exists() and any(out.iterdir()) and not note.exists():
        raise ExportError(f"{out} is not empty and holds no export; choose an empty folder.")
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != identity:
        raise ExportError(f"{out} holds an unfinished export of something else; remove it or choose another folder.")
    note.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.copy_files(out)
        config, vae = source.configs(out)
        wanted = settings.blocks or get_args(BlockKind)
        job = Job(source, settings, out, [b for b in all_blocks(config, vae) if b.kind in wanted], templates)
        plan_forms(source, settings, job.blocks)
    except BaseException:
        if not note.exists():
            shutil.rmtree(out)
        raise
    note.write_text(json.dumps(identity), encoding="utf-8")
    return job


def _finish(job: Job, target: str) -> ExportFolder:
    notes = [json.loads((job.out / NOTES / f"{data}.json").read_text(encoding="utf-8")) for data, _ in job.groups()]
    files = {name: entry for note in notes for name, entry in note["files"].items()}
    for name in FOLDER_FILES:
        if (job.out / name).is_file():
            files[name] = _file_entry(job.out / name).model_dump()
    config, _ = job.source.configs(job.out)
    manifest = ExportManifest(
        tool=f"bagel-compress {version('bagel-compress')}",
        versions=versions(),
        source={"kind": job.source.kind, "name": job.source.name, "digest": job.source.digest},
        target=target,
        settings=job.settings,
        opset=OPSET,
        config=config_dict(config),
        blocks={name: BlockEntry.model_validate(b) for note in notes for name, b in note["blocks"].items()},
        files={name: FileEntry.model_validate(files[name]) for name in sorted(files)},
    )
    write_file(job.out / MANIFEST, manifest.to_bytes())
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


# --- one data file and its graphs -------------------------------------------------------------------------------------


def _write_group(job: Job, data: str, blocks: list[Block], note: Path) -> None:
    names = {block.weights[name]: name for block in blocks for name in block.weights}  # path in Bagel -> in the graph
    dense = set().union(*(matrices(b) for b in blocks))
    forms = {} if blocks[0].wide else plan_forms(job.source, job.settings, blocks)
    pieces, entry = _write_data(job, job.out / f"{data}.data", names, dense, forms, wide=blocks[0].wide)
    files, entries = {f"{data}.data": entry.model_dump()}, {}
    for block in blocks:
        model = _instance(job, block, pieces, forms)
        write_file(job.out / f"{block.name}.onnx", model.SerializeToString(deterministic=True))
        _check(job.out / f"{block.name}.onnx", block)
        files[f"{block.name}.onnx"] = _file_entry(job.out / f"{block.name}.onnx").model_dump()
        entries[block.name] = _block_entry(block, model, forms, pieces).model_dump(mode="json")
    write_file(note, json.dumps({"files": files, "blocks": entries}).encode())


def _write_data(
    job: Job, path: Path, names: dict[str, str], dense: set[str], forms: dict[str, FormName], wide: bool
) -> tuple[dict[str, WeightEntry], FileEntry]:
    """Writes all values of a data file. Returns initialiser name -> piece."""
    digest, position, pieces = hashlib.sha256(), 0, {}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for source_path, name in names.items():
            for key, stored in _values(job, source_path, name, dense, forms, wide).items():
                gap = b"\0" * (-position % ALIGN)
                content = stored.data.view(np.uint8).reshape(-1).data
                for part in (gap, content):
                    file.write(part)
                    digest.update(part)
                position += len(gap) + len(content)
                offset = position - len(content)
                pieces[key] = WeightEntry(type=stored.elem_type, shape=stored.shape, offset=offset, bytes=len(content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return pieces, FileEntry(bytes=position, sha256=digest.hexdigest())


def _values(
    job: Job, path: str, name: str, dense: set[str], forms: dict[str, FormName], wide: bool
) -> dict[str, Stored]:
    """Initialiser name -> values of one weight."""
    import torch

    form = forms.get(path, "dense")
    if form != "dense":
        return {name + suffix: stored for suffix, stored in coded(form, job.source.coded(path), job.dtype).items()}
    label = path if path.startswith(VAE_PREFIX) else job.source.official[path]
    kept = torch.float32 if wide else job.dtype
    return {name: plain(job.source.tensor(path), kept, label, transpose=name in dense)}


def _instance(job: Job, block: Block, pieces: dict[str, WeightEntry], forms: dict[str, FormName]) -> onnx.ModelProto:
    """The template with this block's weights in place of the template's weight inputs."""
    import onnx

    key = f"{block.kind}.{'fp32' if block.wide else job.settings.precision}"
    if key not in job.templates:
        job.templates[key] = template(block, job.dtype).SerializeToString()
    model = onnx.ModelProto.FromString(job.templates[key])
    graph = model.graph
    graph.name = block.name
    ports = {p.name for p in block.inputs}
    shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in graph.input}
    kept = [i for i in graph.input if i.name in ports]
    del graph.input[:]
    graph.input.extend(kept)
    for name, path in block.weights.items():
        if (form := forms.get(path, "dense")) != "dense":
            rewrite(graph, name, form, (shapes[name][0], shapes[name][1]))
    used = {i for node in graph.node for i in node.input}
    graph.initializer.extend(_external(name, p, block) for name, p in pieces.items() if name in used)
    if any(node.domain == "com.microsoft" for node in graph.node):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return model


def _external(name: str, piece: WeightEntry, block: Block) -> onnx.TensorProto:
    from onnx import TensorProto

    tensor = TensorProto(name=name, data_type=piece.type, dims=piece.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", f"{block.data}.data"), ("offset", piece.offset), ("length", piece.bytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _check(path: Path, block: Block) -> None:
    """onnx.checker with shape inference, by path. Raises ExportError naming the block."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"block {block.name}: {path.name} does not pass onnx.checker ({error}).") from None


def _block_entry(
    block: Block, model: onnx.ModelProto, forms: dict[str, FormName], pieces: dict[str, WeightEntry]
) -> BlockEntry:
    def ports(side: tuple) -> tuple[PortEntry, ...]:  # type: ignore[type-arg]
        return tuple(PortEntry(name=p.name, dtype=p.dtype, shape=p.shape) for p in side)

    own = {i.name for i in model.graph.initializer if i.name in pieces}
    return BlockEntry(
        kind=block.kind,
        model=f"{block.name}.onnx",
        data=f"{block.data}.data",
        inputs=ports(block.inputs),
        outputs=ports(block.outputs),
        nodes=dict(sorted(Counter(n.op_type for n in model.graph.node).items())),
        forms=dict(sorted(Counter(forms[p] for p in block.weights.values() if p in forms).items())),
        weights={name: p for name, p in sorted(pieces.items()) if name in own},
    )


def _file_entry(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=file_sha256(path))


def write_file(path: Path, content: bytes) -> None:
    """Writes a small file so that it is either complete or absent."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


__all__ = ["Job", "elem_type", "export", "plan_forms", "versions", "write_file"]
