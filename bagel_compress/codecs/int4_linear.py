"""int4 at run time: decoded on every device. Its kernels are those of exports (ONNX Runtime, TensorRT)."""

from __future__ import annotations

from bagel_compress.codecs.linears import ScaledLinear


class Int4Linear(ScaledLinear):
    """Symmetric INT4 in blocks of 32; no kernel, always decoded."""

    codec = "int4"
    kernel = None
