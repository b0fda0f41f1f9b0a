"""Reads stored elements of any float type as bf16, rounded to nearest even, with numpy alone.

numpy has no bf16 type, so a bf16 number is held as its 16 bits in a uint16, here called a word.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

from bagel_compress.io.safetensors_file import StoredTensor, TensorFile

if TYPE_CHECKING:
    import numpy as np
    import torch

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}  # dtypes that weights may be stored in -> bytes per element
BLOCK = 1 << 18  # elements rounded at a time, so that temporaries fit into the L2 cache


def stored(file: TensorFile, tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """The bits of elements [start, stop) of the flattened tensor: uint16, or uint32 for F32."""
    import numpy as np

    width = WIDTHS[tensor.dtype]
    data = file.read(tensor.start + start * width, tensor.start + stop * width)
    return data.view(np.uint16 if width == 2 else np.uint32)


def floats(words: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bits of the given dtype -> fp32 values."""
    import numpy as np

    if dtype == "F32":
        return words.view(np.float32)
    if dtype == "F16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """fp32 of any shape -> bf16 words, to nearest, ties to even; NaN stays NaN. Equal to torch's `.to(bfloat16)`."""
    import numpy as np

    flat, out = np.ascontiguousarray(values, np.float32).reshape(-1), np.empty(values.size, np.uint16)
    for start in range(0, values.size, BLOCK):
        block = flat[start : start + BLOCK]
        bits = block.view(np.uint32)
        words = (bits >> 16) & 1
        words += bits
        words += 0x7FFF
        words >>= 16
        nan = np.isnan(block)
        if nan.any():
            words[nan] = 0x7FC0
        out[start : start + block.size] = words
    return out.reshape(values.shape)


def as_tensor(words: np.ndarray) -> torch.Tensor:
    """uint16 words -> bf16 tensor, uint8 -> uint8 tensor, on the same memory. Do not write to it: it may be mapped."""
    import torch

    _accept_read_only()
    tensor = torch.from_numpy(words)
    return tensor.view(torch.bfloat16) if words.itemsize == 2 else tensor


def as_words(values: torch.Tensor) -> np.ndarray:
    """1-D bf16 tensor -> its words as a uint16 array on the same memory."""
    import torch

    words: np.ndarray = values.view(torch.uint16).numpy()
    return words


@cache
def _accept_read_only() -> None:
    """Silences torch's warning about read-only arrays, which it gives once per process; these are never written to."""
    import numpy as np
    import torch

    empty = np.zeros(1, np.uint8)
    empty.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(empty)
