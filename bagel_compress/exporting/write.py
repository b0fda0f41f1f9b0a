"""Writes one data file and the graphs that refer to it: weights, graphs from templates, checks, engines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from bagel_compress.build.manifest import FileEntry
from bagel_compress.codecs.traits import FormName
from bagel_compress.errors import ExportError
from bagel_compress.exporting.blocks import GraphBlock, matrices
from bagel_compress.exporting.graph import template
from bagel_compress.exporting.manifest import BlockEntry, PortEntry, WeightEntry
from bagel_compress.exporting.onnx_weights import Initializer, encoded_values, insert_decoding_nodes, plain_values
from bagel_compress.exporting.source import VAE_PREFIX, WeightSource
from bagel_compress.exporting.tensorrt import build_engine
from bagel_compress.io.atomic import atomic_file, write_atomic
from bagel_compress.io.digests import blake3_file
from bagel_compress.run.export_settings import TORCH_NAMES, ExportSettings, Range

if TYPE_CHECKING:
    import onnx
    import torch

ALIGN = 4096  # alignment in bytes of each weight in a data file: a page, so that runtimes can map it


@dataclass
class ExportJob:
    """One export: its source and settings, the blocks to export, and the templates traced so far."""

    source: WeightSource
    settings: ExportSettings
    axes: Mapping[str, Range]
    out: Path
    blocks: list[GraphBlock]
    templates: dict[str, bytes]  # serialised, by kind and precision

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, TORCH_NAMES[self.settings.precision])
        return dtype

    def groups(self) -> Iterator[tuple[str, list[GraphBlock]]]:
        """(stem of a data file, the blocks whose weights it holds), for every data file."""
        for data in dict.fromkeys(b.data for b in self.blocks):
            yield data, [b for b in self.blocks if b.data == data]


def plan_forms(source: WeightSource, settings: ExportSettings, blocks: Sequence[GraphBlock]) -> dict[str, FormName]:
    """Path of a matrix in Bagel -> its form in the graph. Raises ExportError if a codec has no form in the runtime."""
    by_kind = {b.kind: matrices(b) for b in {b.kind: b for b in blocks}.values()}
    paths = {b.weights[name] for b in blocks if not b.in_fp32 for name in by_kind[b.kind]}
    runtime = (settings.runtime, settings.activations)
    return {path: source.codec(path).onnx_form(source.official[path], *runtime) for path in sorted(paths)}


def write_group(job: ExportJob, data: str, blocks: list[GraphBlock], record: Path) -> None:
    """Writes a data file, its graphs and engines, and then the record that lists them."""
    names = {block.weights[name]: name for block in blocks for name in block.weights}  # path in Bagel -> in the graph
    dense = set().union(*(matrices(b) for b in blocks))
    forms = {} if blocks[0].in_fp32 else plan_forms(job.source, job.settings, blocks)
    weights, entry = _write_data(job, job.out / f"{data}.data", names, dense, forms, in_fp32=blocks[0].in_fp32)
    files, entries = {f"{data}.data": entry.model_dump()}, {}
    for block in blocks:
        model = _instance(job, block, weights, forms)
        write_atomic(job.out / f"{block.name}.onnx", model.SerializeToString(deterministic=True))
        _check(job.out / f"{block.name}.onnx", block)
        files[f"{block.name}.onnx"] = file_entry(job.out / f"{block.name}.onnx").model_dump()
        made = _block_entry(block, model, forms, weights)
        if job.settings.runtime != "onnxruntime":
            made = made.model_copy(update={"engine": _write_engine(job, block, made)})
            files[made.engine] = file_entry(job.out / made.engine).model_dump()
        entries[block.name] = made.model_dump(mode="json")
    write_atomic(record, json.dumps({"files": files, "blocks": entries}).encode())


def _write_data(
    job: ExportJob, path: Path, names: dict[str, str], dense: set[str], forms: dict[str, FormName], in_fp32: bool
) -> tuple[dict[str, WeightEntry], FileEntry]:
    """Writes all values of a data file. Returns initialiser name -> its entry, and the entry of the file."""
    digest, position, weights = blake3(), 0, {}
    with atomic_file(path) as file:
        for source_path, name in names.items():
            for key, stored in _values(job, source_path, name, dense, forms, in_fp32).items():
                gap = b"\0" * (-position % ALIGN)
                content = stored.data.view(np.uint8).reshape(-1).data
                for part in (gap, content):
                    file.write(part)
                    digest.update(part)
                position += len(gap) + len(content)
                offset = position - len(content)
                weights[key] = WeightEntry(type=stored.elem_type, shape=stored.shape, offset=offset, bytes=len(content))
    return weights, FileEntry(bytes=position, blake3=digest.hexdigest())


def _values(
    job: ExportJob, path: str, name: str, dense: set[str], forms: dict[str, FormName], in_fp32: bool
) -> dict[str, Initializer]:
    """The initialisers of one weight: name -> values."""
    import torch

    form = forms.get(path, "dense")
    if form != "dense":
        return {
            name + suffix: stored
            for suffix, stored in encoded_values(form, job.source.encoded(path), job.dtype).items()
        }
    label = path if path.startswith(VAE_PREFIX) else job.source.official[path]
    dtype = torch.float32 if in_fp32 else job.dtype
    return {name: plain_values(job.source.tensor(path), dtype, label, transpose=name in dense)}


def _instance(
    job: ExportJob, block: GraphBlock, weights: dict[str, WeightEntry], forms: dict[str, FormName]
) -> onnx.ModelProto:
    """The template of the block's kind, its weight inputs replaced by initialisers that refer to the data file."""
    import onnx

    key = f"{block.kind}.{'fp32' if block.in_fp32 else job.settings.precision}"
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
            insert_decoding_nodes(graph, name, form, (shapes[name][0], shapes[name][1]))
    used = {i for node in graph.node for i in node.input}
    graph.initializer.extend(_external(name, p, block) for name, p in weights.items() if name in used)
    if any(node.domain == "com.microsoft" for node in graph.node):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return model


def _external(name: str, weight: WeightEntry, block: GraphBlock) -> onnx.TensorProto:
    from onnx import TensorProto

    tensor = TensorProto(name=name, data_type=weight.type, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", f"{block.data}.data"), ("offset", weight.offset), ("length", weight.bytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _write_engine(job: ExportJob, block: GraphBlock, entry: BlockEntry) -> str:
    """Builds and writes the engine of a block. Returns the file's name."""
    name = f"{block.name}.engine"
    write_atomic(job.out / name, build_engine(block.name, entry, job.out / entry.model, job.settings, job.axes).data)
    return name


def _check(path: Path, block: GraphBlock) -> None:
    """Runs onnx.checker with shape inference on a written graph. Raises ExportError naming the block."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"block {block.name}: {path.name} does not pass onnx.checker ({error}).") from None


def _block_entry(
    block: GraphBlock, model: onnx.ModelProto, forms: dict[str, FormName], weights: dict[str, WeightEntry]
) -> BlockEntry:
    def ports(side: tuple) -> tuple[PortEntry, ...]:  # type: ignore[type-arg]
        return tuple(PortEntry(name=p.name, dtype=p.dtype, shape=p.shape) for p in side)

    own = {i.name for i in model.graph.initializer if i.name in weights}
    return BlockEntry(
        kind=block.kind,
        model=f"{block.name}.onnx",
        data=f"{block.data}.data",
        inputs=ports(block.inputs),
        outputs=ports(block.outputs),
        nodes=dict(sorted(Counter(n.op_type for n in model.graph.node).items())),
        forms=dict(sorted(Counter(forms[p] for p in block.weights.values() if p in forms).items())),
        weights={name: p for name, p in sorted(weights.items()) if name in own},
    )


def file_entry(path: Path) -> FileEntry:
    """Size and BLAKE3 of a finished file."""
    return FileEntry(bytes=path.stat().st_size, blake3=blake3_file(path))
