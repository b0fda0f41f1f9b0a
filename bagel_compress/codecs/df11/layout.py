"""The stored form of one DF11 unit: constants, the six tensors and their shapes. No numba, no torch.

Source of names, shapes and limits: the `dfloat11` package, version 0.5.0, its loader and its decode kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from bagel_compress.io.tensor_spec import PartSpec

THREADS_PER_BLOCK = 512
BYTES_PER_THREAD = 8
BLOCK_BYTES = THREADS_PER_BLOCK * BYTES_PER_THREAD  # what one GPU block decodes
BLOCK_BITS = 8 * BLOCK_BYTES
WINDOW_BITS = 8 * BYTES_PER_THREAD  # what one GPU thread decodes
GAP_BYTES = THREADS_PER_BLOCK * 5 // 8  # packed 5-bit gaps of one block
MAX_CODE_BITS = 32
MAX_LEVELS = MAX_CODE_BITS // 8  # tables walked for one code
MAX_TABLES = 17  # the root and 16 children: a table value of 240 or more is a pointer, 256 - row
FIRST_POINTER = 240  # so exponents from here on (|w| >= 2^113, Inf, NaN) cannot be coded
# The kernel's shared memory is 2052 + 2 * weights bytes and it asks for no more than the default 48 KiB.
MAX_BLOCK_WEIGHTS = (48 * 1024 - 2052) // 2
MAX_UNIT_WEIGHTS = 2**31 - 1  # indices are 32-bit in the kernel
SUFFIXES = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions")


@dataclass(frozen=True, slots=True)
class UnitSizes:
    """Sizes of one unit's tensors: weights, bytes of the code stream, decode tables, tensors in the unit."""

    weights: int
    stream_bytes: int
    tables: int
    tensors: int

    @property
    def blocks(self) -> int:
        return -(-self.stream_bytes // BLOCK_BYTES)

    def parts(self, unit: str) -> dict[str, PartSpec]:
        """The six stored tensors by full name, widest dtype first, as safetensors writers order them."""
        return {
            f"{unit}.split_positions": PartSpec("I64", (self.tensors - 1,)),
            f"{unit}.encoded_exponent": PartSpec("U8", (self.stream_bytes,)),
            f"{unit}.gaps": PartSpec("U8", (GAP_BYTES * self.blocks,)),
            f"{unit}.luts": PartSpec("U8", (self.tables + 1, 256)),
            f"{unit}.output_positions": PartSpec("U8", (4 * (self.blocks + 1),)),
            f"{unit}.sign_mantissa": PartSpec("U8", (self.weights,)),
        }
