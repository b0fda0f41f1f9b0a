"""int8 at run time. On CUDA bitsandbytes' LLM.int8: rows of x go to int8, columns with a value over 6 stay in fp16."""

from __future__ import annotations

import torch

from bagel_compress.codecs.linears import ScaledLinear, bitsandbytes_ops

OUTLIER = 6.0  # llm_int8_threshold of bitsandbytes and transformers


class Int8Linear(ScaledLinear):
    """bitsandbytes LLM.int8 rows; `scale` is SCB, (N,) fp32."""

    codec = "int8"

    @property
    def kernel(self) -> str | None:
        return "bitsandbytes LLM.int8" if self.codes.is_cuda and bitsandbytes_ops() is not None else None

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """The steps of bitsandbytes' MatMul8bitLt with threshold 6."""
        library = bitsandbytes_ops()
        rows = x.reshape(-1, self.in_features)
        half = rows.to(torch.float16, copy=True)  # the quantiser blanks outliers in place for a moment
        codes, scales, outliers = library.int8_vectorwise_quant.default(half, OUTLIER)
        y, _ = library.int8_mixed_scaled_mm.default(
            rows, codes, self.codes, scales, self.scale, outliers, self._bias(x)
        )
        return y.reshape(*x.shape[:-1], self.out_features)


class ScaledInt8Linear(ScaledLinear):
    """Rows of int8 with fp32 scales (N, 1); always decoded, for bitsandbytes' kernels want another scale."""

    codec = "int8"
    kernel = None
