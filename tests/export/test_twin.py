"""Exports for cards, judged on a CPU: their own bf16 graphs as fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from test_forms import LAYERS, layer_inputs, relative, run_gen_layer

from bagel.sampler import Sampler
from bagel_compress.exporting.fp32_copy import BFLOAT16, fp32_copy
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.exporting.source import WeightSource


@pytest.mark.parametrize("codec", ["raw", "int4", "fp8"])
def test_the_twin_computes_what_the_folder_says(
    codec: str,
    artifact: Callable[[str], Path],
    make: Callable[..., ExportFolder],
    fp32: Sampler,
    tmp_path: Path,
) -> None:
    source = WeightSource.open(artifact(codec))
    folder = make(source, "bf16", blocks=LAYERS, precision="bf16")
    (tmp_path / "twin").mkdir()
    twin = fp32_copy(folder, tmp_path / "twin")
    assert twin.digest == folder.digest
    for entry in folder.manifest.blocks.values():
        onnx.checker.check_model(str(twin.path / entry.model), full_check=True)
        model = onnx.load(twin.path / entry.model, load_external_data=False)
        values = [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)]
        assert BFLOAT16 not in {*values, *(i.data_type for i in model.graph.initializer)}
    inputs = layer_inputs(fp32)
    exact = run_gen_layer(make(source, "fp32", blocks=LAYERS), inputs)
    assert relative(run_gen_layer(twin, inputs), exact) < 5e-3  # scales of int8 and int4 are rounded to bf16 there

    data = folder.path / folder.manifest.blocks["gen_layer_01"].data
    content = bytearray(data.read_bytes())
    weights = folder.manifest.blocks["gen_layer_01"].weights
    codes = weights.get("gen.down_proj.weight.codes") or weights["gen.down_proj.weight"]
    content[codes.offset : codes.offset + codes.bytes // 2] = bytes(codes.bytes // 2)
    data.write_bytes(content)
    (tmp_path / "damaged").mkdir()
    damaged = run_gen_layer(fp32_copy(folder, tmp_path / "damaged"), inputs)
    assert relative(damaged, exact) > 0.05  # it is the folder's own bytes that are run
