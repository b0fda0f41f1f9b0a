"""DF11 decoding in CUDA: `kernel.cu`, compiled when it is first needed by the NVRTC that PyTorch brings along.

Against the package's own kernel: one decoding pass instead of two (entries stay in registers between count and write),
several exponents per lookup and from shared memory instead of the cache, warp shuffles instead of 18 barriers, 16-byte
stores. Thread blocks stay on their multiprocessor and load the tables once. Shared memory is 16 KB of table, the stored
tables and as many bytes as the densest block has weights (about 13 KB for trained weights), below 48 KB by the format's
limit, so it runs without opt-in: three blocks of 512 threads per multiprocessor on Ada, four on Hopper by memory.

No GPU has run it yet: it compiles for sm_89 and sm_90, and a test runs its functions on a CPU, thread by thread.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import torch

LOOKUP_BITS = 11  # LOOKUP_BITS of kernel.cu
THREADS = 512
_BLOCKS_PER_PROCESSOR = 4
_ALIGNMENT = 16


def source() -> str:
    """The kernel's CUDA C."""
    return files(__package__).joinpath("kernel.cu").read_text(encoding="utf-8")


def available() -> bool:
    """Whether this PyTorch can compile it: a CUDA build with run-time compilation."""
    return torch.version.cuda is not None and hasattr(torch.cuda, "_compile_kernel")


def decode(
    table: torch.Tensor,
    luts: torch.Tensor,
    stream: torch.Tensor,
    rest: torch.Tensor,
    positions: torch.Tensor,
    gaps: torch.Tensor,
    out: torch.Tensor,
    densest: int,
) -> None:
    """Fills bf16 `out` [weights] on the current stream.

    All on one CUDA device and 16-byte aligned: int64 `table` [2^11], int32 `positions` [blocks + 1] (the bits of
    uint32), else uint8. `densest` is the most weights of a block.
    """
    blocks = positions.numel() - 1
    staging = -(-(densest + 8) // 16) * 16
    shared = 8 * (1 << LOOKUP_BITS) + luts.numel() + staging
    grid = min(blocks, _BLOCKS_PER_PROCESSOR * torch.cuda.get_device_properties(out.device).multi_processor_count)
    with torch.cuda.device(out.device):
        _kernel(out.device.index)(
            grid=(grid, 1, 1),
            block=(THREADS, 1, 1),
            args=[
                table, luts, luts.shape[0] - 1, stream, stream.numel(), rest, positions, gaps, gaps.numel(), out,
                rest.numel(), blocks, staging,
            ],
            shared_mem=shared,
        )  # fmt: skip


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy at an address that the kernel's vector loads can use."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


@cache
def _kernel(device: int) -> Any:
    return torch.cuda._compile_kernel(source(), "df11_decode")
