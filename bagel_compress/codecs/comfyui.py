"""How ComfyUI's files order what the block floats store: cuBLAS tiles of scales, and nibbles the other way round.

Source: `to_blocked` and `pack_uint4` of comfy-kitchen 0.2.40, and cuBLAS' "1D block scaling factors layout".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bagel_compress.errors import ExportError
from bagel_compress.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch

TILE_ROWS, TILE_COLUMNS = 128, 4  # scales in a tile
SLICE = 32  # rows of a tile that lie 16 bytes apart


def tiled(scales: torch.Tensor) -> torch.Tensor:
    """(N, B) of one byte each -> (N, B) rounded up to whole tiles, tile after tile; zeros where there is no scale.

    In a tile of 512 bytes the scale of row r and column c lies at (r % 32) * 16 + r // 32 * 4 + c.
    """
    import torch

    rows, columns = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    tiles = padded.unflatten(0, (-1, TILE_ROWS // SLICE, SLICE)).unflatten(3, (-1, TILE_COLUMNS))
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape).view(scales.dtype)


def high_first(packed: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, uint8: swaps the nibbles."""
    return (packed << 4) | (packed >> 4)


def check_padding(spec: TensorSpec, multiple: int) -> None:
    """Raises ExportError for a weight that ComfyUI's loader would hold padded, in another shape than the model's."""
    if any(size % multiple for size in spec.shape):
        raise ExportError(
            f"{spec.name}: ComfyUI's kernels need both sizes to be multiples of {multiple}, found {list(spec.shape)}; "
            "give this tensor codec raw in the recipe."
        )
