"""Looks for NaN and infinity in values that are read anyway: as they go by, like a digest of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bagel_compress.codecs.matrix import finite
from bagel_compress.io.bf16 import WIDTHS, floats

if TYPE_CHECKING:
    import numpy as np


class FiniteValues:
    """`finite` tells whether all values of a tensor are; `update` takes its bytes in order, in whole elements.

    A block is looked at right after it was read or hashed, when it is still in the cache.
    """

    def __init__(self, dtype: str = "BF16") -> None:
        self.dtype = dtype
        self.finite = True

    def update(self, data: bytes | memoryview, /) -> None:
        import numpy as np

        words = np.frombuffer(data, np.uint16 if WIDTHS[self.dtype] == 2 else np.uint32)
        self.finite = self.finite and (finite(words) if self.dtype == "BF16" else _finite(floats(words, self.dtype)))


def _finite(values: np.ndarray) -> bool:
    return math.isfinite(values.max()) and math.isfinite(values.min())  # both are NaN if any value is
