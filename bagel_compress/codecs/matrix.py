"""What the lossy codecs share: a unit is one bf16 weight matrix `X.weight`, read as 16-bit words.

The bf16 word is the top half of the fp32 word, so its low 15 bits order magnitudes and 0x7F80 and up are Inf and NaN:
absolute maxima and finiteness are integer questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from bagel_compress.codecs.base import Codec, Reader, Unit
from bagel_compress.errors import CodecError, PlanError
from bagel_compress.io.buffers import Buffers
from bagel_compress.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

INFINITY_WORD = 0x7F80  # bf16: exponent all ones
_codes = Buffers()
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


def read_rows(source: Reader, spec: TensorSpec) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, words (R, K)) over the whole matrix, in whole rows of about CHUNK_ELEMENTS."""
    rows, columns = spec.shape
    step = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield first, read_words(source, spec, first * columns, last * columns).reshape(last - first, columns)


def memory_for_codes(rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, columns], content undefined, of memory that is used again when nothing refers to it any more."""
    return _codes.take(rows * columns).reshape(rows, columns)


def absmax_words(words: np.ndarray, spec: TensorSpec, codec: Codec) -> np.ndarray:
    """(R,) uint16: the largest magnitude word of each row. Raises CodecError on NaN and Inf."""
    import numpy as np

    from bagel_compress.codecs.kernels.rows_kernels import absmax_rows
    from bagel_compress.codecs.kernels.threads import split

    tops = np.empty(len(words), np.uint16)
    split(lambda a, b: absmax_rows(words[a:b], tops[a:b]), len(words), 1)
    if (tops >= INFINITY_WORD).any():
        raise not_finite(spec, codec)
    return tops


def finite(words: np.ndarray) -> bool:
    """Whether no bf16 word of a 1-D array is NaN or Inf."""
    import numpy as np

    from bagel_compress.codecs.kernels.rows_kernels import absmax_rows

    top = np.empty(1, np.uint16)
    absmax_rows(words.reshape(1, -1), top)
    return bool(top[0] < INFINITY_WORD)


def as_floats(words: np.ndarray) -> np.ndarray:
    """bf16 words -> fp32 values."""
    import numpy as np

    return (words.astype(np.uint32) << 16).view(np.float32)


def check_shapes(codec: Codec, unit: Unit, parts: Mapping[str, torch.Tensor]) -> None:
    """Raises CodecError if a stored part is missing or has another shape than the unit calls for."""
    for name, part in codec.parts(unit).items():
        found = list(parts[name].shape) if name in parts else "nothing"
        if found != list(part.shape):
            raise CodecError(f"{name}: expected shape {list(part.shape)}, found {found}; the artifact is damaged.")


def not_finite(spec: TensorSpec, codec: Codec) -> CodecError:
    """The error for a weight with NaN or Inf."""
    return CodecError(
        f"{spec.name}: holds NaN or Inf, codec {codec.format} needs finite weights; mend the checkpoint, or give this"
        " tensor codec raw in a recipe with `non_finite: kept`."
    )


def self_check(spec: TensorSpec, codec: Codec, passed: bool) -> None:
    """Raises CodecError if what was decoded from the bytes just written is further off than rounding explains."""
    if not passed:
        raise CodecError(
            f"{spec.name}: the {codec.format} bytes just written do not decode to the weights, which no input causes; "
            "check the machine's memory, run again, and report it if it stays."
        )
