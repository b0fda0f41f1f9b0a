"""A folder's bf16 graphs as fp32, so that a CPU can run what was exported for a GPU.

Nodes, codes and scales are the folder's own, read from its files; only what is bf16 (scales, plain weights, types of
values) becomes fp32, which changes no weight. What the copy shows is true of graphs and weights. It says nothing of
kernels of the GPU, nor of an engine.
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
    """Writes the copy into an empty folder; it needs as much disk as the graphs, twice that for plain weights."""
    blocks = folder.manifest.blocks.values()
    for data in dict.fromkeys(entry.data for entry in blocks):
        sharing = [entry for entry in blocks if entry.data == data]
        places = _widened_data(folder.file(data), out / data, sharing)
        for entry in sharing:
            _widened_graph(folder.file(entry.model), out / entry.model, places)
    rest = folder.manifest.files.keys() - {f for b in blocks for f in (b.model, b.data, b.engine)}
    for name in rest:
        shutil.copyfile(folder.file(name), out / name)
    plain = {"runtime": "onnxruntime", "precision": "fp32", "provider": "cpu"}
    settings = folder.manifest.settings.model_copy(update=plain)
    engines = {entry.engine for entry in blocks}
    files = {name: file_entry(out / name) for name in folder.manifest.files if name not in engines}
    manifest = folder.manifest.model_copy(update={"settings": settings, "files": files})
    return ExportFolder(out, manifest, folder.digest)


def _widened_data(source: Path, target: Path, blocks: list[BlockEntry]) -> WeightEntries:
    """Copies the values of a data file, bf16 as fp32. Returns initialiser name -> its new place."""
    stored = np.memmap(source, np.uint8, "r")
    places: WeightEntries = {}
    with atomic_file(target) as file:
        for name, w in sorted({n: w for b in blocks for n, w in b.weights.items()}.items()):
            values = stored[w.offset : w.offset + w.bytes]
            if w.type == BFLOAT16:
                values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.uint8)
            file.write(b"\0" * (-file.tell() % ALIGN))
            kind = FLOAT if w.type == BFLOAT16 else w.type
            places[name] = WeightEntry(type=kind, shape=w.shape, offset=file.tell(), bytes=len(values))
            file.write(values.data)
    return places


def _widened_graph(source: Path, target: Path, places: WeightEntries) -> None:
    import onnx

    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == BFLOAT16:
            value.type.tensor_type.elem_type = FLOAT
    for tensor in graph.initializer:
        if tensor.name in places:
            _move(tensor, places[tensor.name])
        else:
            _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == BFLOAT16:
                attribute.i = FLOAT
            if attribute.HasField("t"):
                _widen(attribute.t)
    write_atomic(target, model.SerializeToString())


def _move(tensor: onnx.TensorProto, place: WeightEntry) -> None:
    tensor.data_type = place.type
    for item in tensor.external_data:
        if item.key in ("offset", "length"):
            item.value = str(place.offset if item.key == "offset" else place.bytes)


def _widen(tensor: onnx.TensorProto) -> None:
    """A constant inside the graph."""
    from onnx import numpy_helper

    if tensor.data_type == BFLOAT16:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
