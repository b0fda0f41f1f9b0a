"""Copies an export folder with its bf16 graphs in fp32, so that a CPU can run what was exported for a GPU.

Nodes, codes and scales are copied from the folder's files; only bf16 values and types (of scales, plain weights and
values between nodes) become fp32, which changes no weight. A test of the copy therefore covers the graphs and the
weights, but neither the GPU's kernels nor TensorRT's engines.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bagel_compress.exporting.manifest import BlockEntry, ExportFolder, WeightEntry
from bagel_compress.exporting.write import ALIGN, file_entry
from bagel_compress.io.atomic import atomic_file, write_atomic

if TYPE_CHECKING:
    import onnx

FLOAT, BFLOAT16 = 1, 16  # ONNX element types
WeightEntries = dict[str, WeightEntry]


def fp32_copy(folder: ExportFolder, out: Path) -> ExportFolder:
    """Writes the copy into the empty folder `out`. It takes the disk space of the source; plain weights take twice."""
    blocks = folder.manifest.blocks.values()
    for data in dict.fromkeys(entry.data for entry in blocks):
        sharing = [entry for entry in blocks if entry.data == data]
        weights = _copy_data(folder.file(data), out / data, sharing)
        for entry in sharing:
            _copy_graph(folder.file(entry.model), out / entry.model, weights)
    other_files = folder.manifest.files.keys() - {f for b in blocks for f in (b.model, b.data, b.engine)}
    for name in other_files:
        shutil.copyfile(folder.file(name), out / name)
    on_cpu = {"runtime": "onnxruntime", "precision": "fp32", "provider": "cpu"}
    settings = folder.manifest.settings.model_copy(update=on_cpu)
    engines = {entry.engine for entry in blocks}
    files = {name: file_entry(out / name) for name in folder.manifest.files if name not in engines}
    manifest = folder.manifest.model_copy(update={"settings": settings, "files": files})
    return ExportFolder(out, manifest, folder.digest)


def _copy_data(source: Path, target: Path, blocks: list[BlockEntry]) -> WeightEntries:
    """Copies the values of a data file, bf16 as fp32. Returns initialiser name -> type and place in the copy."""
    stored = np.memmap(source, np.uint8, "r")
    weights: WeightEntries = {}
    with atomic_file(target) as file:
        for name, w in sorted({n: w for b in blocks for n, w in b.weights.items()}.items()):
            values = stored[w.offset : w.offset + w.bytes]
            if w.type == BFLOAT16:
                values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.uint8)
            file.write(b"\0" * (-file.tell() % ALIGN))
            kind = FLOAT if w.type == BFLOAT16 else w.type
            weights[name] = WeightEntry(type=kind, shape=w.shape, offset=file.tell(), bytes=len(values))
            file.write(values.data)
    return weights


def _copy_graph(source: Path, target: Path, weights: WeightEntries) -> None:
    """Copies a graph: every bf16 type becomes fp32, and initialisers refer to their places in the copied data file."""
    import onnx

    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == BFLOAT16:
            value.type.tensor_type.elem_type = FLOAT
    for tensor in graph.initializer:
        if tensor.name in weights:
            _refer_to(tensor, weights[tensor.name])
        else:
            _constant_to_fp32(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == BFLOAT16:
                attribute.i = FLOAT
            if attribute.HasField("t"):
                _constant_to_fp32(attribute.t)
    write_atomic(target, model.SerializeToString())


def _refer_to(tensor: onnx.TensorProto, weight: WeightEntry) -> None:
    tensor.data_type = weight.type
    for item in tensor.external_data:
        if item.key in ("offset", "length"):
            item.value = str(weight.offset if item.key == "offset" else weight.bytes)


def _constant_to_fp32(tensor: onnx.TensorProto) -> None:
    """Converts a constant that is stored in the graph itself, if it is bf16."""
    from onnx import numpy_helper

    if tensor.data_type == BFLOAT16:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
