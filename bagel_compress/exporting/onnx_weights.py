"""The forms in which a graph stores a weight: plain values, or the codes of its codec and nodes that decode them.

    dense     the values in the export's precision (raw weights, tables, and formats that are decoded on export)
    qdq       int8 or fp8 codes, DequantizeLinear per output channel, MatMul      standard ONNX: every runtime
    int4      int4 codes, DequantizeLinear in blocks along the input, MatMul      standard ONNX: every runtime
    bnb4      bitsandbytes' own bytes in com.microsoft::MatMulBnb4                ONNX Runtime only
    dynamic   int8 codes in MatMulInteger, input rows quantised at run time       ONNX Runtime on CPU, fp32 only

The codec supplies the codes and chooses the form (`Codec.onnx_form`); the form determines the nodes. No value is
quantised here. MatMul expects the matrix as [in, out], so codes that are stored as [out, in] are transposed; their
values do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bagel_compress.codecs.constants import NF4_BLOCK
from bagel_compress.codecs.traits import FormName
from bagel_compress.errors import ExportError

if TYPE_CHECKING:
    import onnx
    import torch

    from bagel_compress.exporting.source import EncodedTensor

BNB4_NF4 = 1  # quant_type of MatMulBnb4: 0 is FP4, 1 is NF4 (onnxruntime, contrib operators)
INT4_BLOCK = 32
# MatMulInteger gets int8 codes as uint8 with zero point 128: with signed codes, CPUs without VNNI add pairs of products
# in 16 bits, which saturates (6 % error on random codes, onnxruntime 1.32).
SHIFT = 128


@dataclass(frozen=True, slots=True)
class Initializer:
    """Values of one initialiser. The bytes of `data` are stored as they are; its numpy dtype does not matter."""

    elem_type: int
    shape: tuple[int, ...]
    data: np.ndarray


def plain_values(tensor: torch.Tensor, dtype: torch.dtype, name: str, transpose: bool = False) -> Initializer:
    """A tensor's values in `dtype`, transposed if asked. Raises ExportError naming the tensor if fp16 overflows."""
    import torch

    values = tensor.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(values).all()):
        peak = float(tensor.abs().max())
        raise ExportError(f"{name}: {peak:.4g} is beyond fp16 (65504); export with precision bf16 or fp32.")
    if transpose:
        values = values.t()
    values = values.contiguous()
    return Initializer(elem_type(dtype), tuple(values.shape), values.reshape(-1).view(torch.uint8).numpy())


def encoded_values(form: FormName, item: EncodedTensor, dtype: torch.dtype) -> dict[str, Initializer]:
    """The initialisers of a compressed matrix: suffix of the name -> values. `dtype` is the export's precision."""
    from onnx import TensorProto

    stored = item.codec.onnx_codes(item.spec, item.parts)
    codes, element = stored.codes, int(getattr(TensorProto, stored.element))
    rows, columns = item.spec.shape
    scales = plain_values(stored.scale, dtype, f"{item.spec.name} (its scales)", transpose=form == "int4")
    if form == "bnb4":
        return {".codes": Initializer(element, (codes.size,), codes), ".absmax": scales}
    transposed = np.ascontiguousarray(codes.reshape(rows, columns).T)
    if form == "int4":
        return {".codes": Initializer(element, (columns, rows), pack_int4(transposed.reshape(-1))), ".scale": scales}
    if form == "dynamic":
        zero = Initializer(TensorProto.UINT8, (), np.array([SHIFT], np.uint8))
        shifted = transposed.view(np.uint8) ^ np.uint8(SHIFT)
        return {".codes": Initializer(TensorProto.UINT8, (columns, rows), shifted), ".zero": zero, ".scale": scales}
    return {".codes": Initializer(element, (columns, rows), transposed), ".scale": scales}


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Packs signed codes -8..7 from one per byte to two per byte, the first in the low nibble (ONNX INT4)."""
    padded = codes if codes.size % 2 == 0 else np.append(codes, np.int8(0))
    nibbles = padded.astype(np.uint8) & 0x0F
    return nibbles[0::2] | (nibbles[1::2] << 4)


def insert_decoding_nodes(graph: onnx.GraphProto, weight: str, form: FormName, shape: tuple[int, int]) -> None:
    """Changes the product with `weight` so that it reads the weight's codes. `shape` is [in, out]."""
    from onnx import helper

    if form in ("qdq", "int4"):
        attributes: dict[str, Any] = {"axis": 0, "block_size": INT4_BLOCK} if form == "int4" else {"axis": 1}
        inputs = [f"{weight}.codes", f"{weight}.scale"]
        node = helper.make_node("DequantizeLinear", inputs, [weight], f"{weight}.dequantize", **attributes)
        graph.node.insert(0, node)
        return
    product = next(n for n in graph.node if n.op_type == "MatMul" and n.input[1] == weight)
    place = list(graph.node).index(product)
    x, y = product.input[0], product.output[0]
    graph.node.remove(product)
    for offset, node in enumerate(_bnb4(x, y, weight, shape) if form == "bnb4" else _dynamic(x, y, weight)):
        graph.node.insert(place + offset, node)


def _bnb4(x: str, y: str, weight: str, shape: tuple[int, int]) -> list[onnx.NodeProto]:
    from onnx import helper

    node = helper.make_node(
        "MatMulBnb4", [x, f"{weight}.codes", f"{weight}.absmax"], [y], f"{weight}.product", domain="com.microsoft",
        K=shape[0], N=shape[1], block_size=NF4_BLOCK, quant_type=BNB4_NF4,
    )  # fmt: skip
    return [node]


def _dynamic(x: str, y: str, weight: str) -> list[onnx.NodeProto]:
    """y = q @ codes * s * scale, where x is quantised to uint8 q with scale s and zero point z.

    ONNX Runtime fuses exactly this chain of operators on the CPU.
    """
    from onnx import TensorProto, helper

    q, s, z, total = (f"{weight}.{part}" for part in ("x", "x_scale", "x_zero", "sum"))
    return [
        helper.make_node("DynamicQuantizeLinear", [x], [q, s, z], f"{weight}.quantize"),
        helper.make_node("MatMulInteger", [q, f"{weight}.codes", z, f"{weight}.zero"], [total], f"{weight}.product"),
        helper.make_node("Cast", [total], [f"{total}_f"], f"{weight}.cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [s, f"{weight}.scale"], [f"{weight}.scales"], f"{weight}.join_scales"),
        helper.make_node("Mul", [f"{total}_f", f"{weight}.scales"], [y], f"{weight}.rescale"),
    ]


def elem_type(dtype: torch.dtype) -> int:
    """torch dtype -> ONNX element type."""
    import torch
    from onnx import TensorProto

    return {
        torch.float32: int(TensorProto.FLOAT), torch.float16: int(TensorProto.FLOAT16),
        torch.bfloat16: int(TensorProto.BFLOAT16),
    }[dtype]  # fmt: skip
