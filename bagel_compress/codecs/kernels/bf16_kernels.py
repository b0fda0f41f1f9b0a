"""bf16 in compiled code: words to fp32 and back, to nearest even. `io.bf16.rounded` is the same rule for arrays.

For numbers only: a NaN's payload may be rounded away, so callers look for NaN first.
"""

# mypy: disable-error-code="operator,no-untyped-def,untyped-decorator"
# (numba types these functions itself)

from __future__ import annotations

import numba
import numpy as np

_inlined = numba.njit(nogil=True, inline="always")


@_inlined
def as_float(word):
    """The number that a bf16 word stands for, fp32."""
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@_inlined
def bf16_word(value):
    """fp32 -> the word of the nearest bf16 number, uint16."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_inlined
def bf16_rounded(value):
    """fp32 -> the nearest bf16 number, fp32."""
    bits = np.float32(value).view(np.uint32)
    bits = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint32(bits & np.uint32(0xFFFF0000)).view(np.float32)
