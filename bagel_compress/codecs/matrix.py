"""What the lossy codecs share: a unit is one bf16 weight matrix `X.weight`, read as 16-bit words.

The bf16 word is the top half of the fp32 word, so its low 15 bits order magnitudes and 0x7F80 and up are Inf and NaN:
absolute maxima and finiteness are integer questions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bagel_compress.codecs.base import Codec, Reader, Unit
from bagel_compress.errors import CodecError, PlanError
from bagel_compress.spec import TensorSpec

if TYPE_CHECKING:
    import numpy as np

INFINITY_WORD = 0x7F80  # bf16: exponent all ones
CHUNK_ELEMENTS = 1 << 22  # 8 MB of bf16: large enough for full disk speed, small enough to bound memory


class MatrixCodec(Codec):
    """Base of the codecs that hold one bf16 matrix per unit."""

    def check(self, unit: Unit) -> None:
        """Raises PlanError for anything but a bf16 matrix whose name ends in `.weight`."""
        for spec in unit.specs:
            if spec.dtype != "BF16" or len(spec.shape) != 2 or spec.numel == 0 or not spec.name.endswith(".weight"):
                raise PlanError(
                    f"{spec.name}: codec {self.format} codes a bf16 matrix named X.weight, found {spec.dtype} of shape "
                    f"{list(spec.shape)}; give it codec raw in the recipe."
                )


def read_words(source: Reader, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """Elements [start, stop) as bf16 words: 1-D uint16, a view of what the reader gave where possible."""
    import numpy as np
    import torch

    values = source.read(spec, start, stop)
    if values.dtype != torch.bfloat16 or values.numel() != stop - start:
        raise CodecError(
            f"{spec.name}: expected {stop - start} bf16 values, the source gave {values.numel()} {values.dtype}."
        )
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def not_finite(spec: TensorSpec, codec: Codec) -> CodecError:
    """The error for a weight with NaN or Inf."""
    return CodecError(
        f"{spec.name}: holds NaN or Inf, codec {codec.format} needs finite weights; "
        "mend the checkpoint or give this tensor codec raw."
    )


def self_check(spec: TensorSpec, codec: Codec, passed: bool) -> None:
    """Raises CodecError if what was decoded from the bytes just written is further off than rounding explains."""
    if not passed:
        raise CodecError(
            f"{spec.name}: the {codec.format} bytes just written do not decode to the weights, which no input causes; "
            "check the machine's memory, run again, and report it if it stays."
        )
