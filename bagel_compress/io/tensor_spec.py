"""TensorSpec: name, dtype and shape of a tensor, as a safetensors header gives them. No torch.

Dtypes are the codes of the safetensors format ("BF16", "F8_E4M3", ...), so that plans are made without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

# Bytes of each element, by safetensors dtype code (safetensors 0.8, `Dtype` enum; sub-byte types are not used here).
DTYPE_BYTES: dict[str, int] = {
    "U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PartSpec:
    """A tensor to be stored: dtype code and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorSpec(PartSpec):
    """A tensor of a checkpoint, under its normalised (official) name."""

    name: str
