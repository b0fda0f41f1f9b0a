"""Traces a block to an ONNX template, in which every weight is still an input; once per kind of block.

Weights are inputs of the traced function, so that tracing needs no values, the exporter cannot fold constants into
them, and one template serves every layer. `write` replaces those inputs by initialisers that refer to a data file.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import TYPE_CHECKING, Any

from bagel_compress.errors import MissingExtraError

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import nn

    from bagel_compress.exporting.blocks import GraphBlock, Port

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
# Axis lengths of the example that is traced. All differ and none is 0 or 1, so that the tracer takes no axis for a
# constant or for another axis. Height and width are the latent's times the block's factor.
EXAMPLE_SIZES = {
    "tokens": 5, "past_tokens": 7, "wrapper_tokens": 2, "latent_tokens": 6, "patches": 12, "latent_height": 8,
    "latent_width": 12,
}  # fmt: skip


def template(block: GraphBlock, dtype: torch.dtype) -> onnx.ModelProto:
    """The block's graph: inputs and outputs are named as its ports; one input more per weight, named by its path.

    `dtype` is the export's precision. Raises MissingExtraError without onnxscript.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingExtraError("exporting needs onnx and onnxscript; install bagel-compress[onnx].") from None
    import torch

    module = block.build()
    inputs = {port.name: _example(port, dtype, block.factor) for port in block.inputs}
    weight_dtype = torch.float32 if block.in_fp32 else dtype
    weights = {name: torch.empty(p.shape, dtype=weight_dtype) for name, p in module.named_parameters()}
    axes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(port.shape) if isinstance(size, str)}
        for port in block.inputs
    )
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # "torchvision missing"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _stateless(module, tuple(weights)),
            (tuple(inputs.values()), tuple(weights.values())),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(axes, (None,) * len(weights)),
            input_names=[*inputs, *weights],
            output_names=[port.name for port in block.outputs],
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _name_axes(model, block)
    _name_nodes(model, set(weights))
    _strip(model)
    return model


def _stateless(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    import torch

    class Stateless(torch.nn.Module):
        def forward(self, inputs: tuple[Any, ...], weights: tuple[Any, ...]) -> Any:
            return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), inputs)

    return Stateless()


def _example(port: Port, dtype: torch.dtype, factor: int) -> torch.Tensor:
    import torch

    pixels = {"height": factor * EXAMPLE_SIZES["latent_height"], "width": factor * EXAMPLE_SIZES["latent_width"]}
    sizes = EXAMPLE_SIZES | pixels
    shape = [sizes[a] if isinstance(a, str) else a for a in port.shape]
    return torch.zeros(shape, dtype=dtype if port.dtype == "float" else getattr(torch, port.dtype))


def _name_axes(model: onnx.ModelProto, block: GraphBlock) -> None:
    """Renames the tracer's axis symbols (s12) to the block's axis names in inputs, outputs and values between nodes."""
    names: dict[str, str] = {}
    ports = {p.name: p for p in block.inputs}
    for value in model.graph.input:
        if value.name in ports:
            for dim, axis in zip(value.type.tensor_type.shape.dim, ports[value.name].shape, strict=True):
                if isinstance(axis, str):
                    names[dim.dim_param] = axis
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), dim.dim_param)


def _name_nodes(model: onnx.ModelProto, weights: set[str]) -> None:
    """Names each node that reads a weight after that weight, so that error messages name parts of the model.

    gen.o_proj is the product with gen.o_proj.weight, gen.q_proj.bias the addition of the bias.
    """
    taken: set[str] = set()
    for node in model.graph.node:
        read = next((name for name in node.input if name in weights), None)
        if read is not None and (name := read.removesuffix(".weight")) not in taken:
            node.name = name
        taken.add(node.name)


def _strip(model: onnx.ModelProto) -> None:
    """Removes the tracer's comments and metadata: stack traces that contain paths of the exporting machine."""
    for holder in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input,
                   *model.graph.output, *model.graph.initializer):  # fmt: skip
        holder.ClearField("doc_string")
        del holder.metadata_props[:]
