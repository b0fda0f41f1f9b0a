"""ecq decoding in CUDA: `kernel.cu`, compiled when it is first needed by the NVRTC that PyTorch brings along.

A thread decodes a run of 2048 weights from its first bit to its last: no gaps, no scan, no second pass, and all threads
take the same steps, so a warp does not diverge but for escapes. The table of 16 KB lies in shared memory; the stream
is read in words of 4 bytes that stay in the cache until they are used up; 8 weights go out in one store of 16 bytes.
An MLP weight of the model is 33,152 threads; a step is a dependent chain of a shared-memory load, a shift and an
addition, about 40 cycles, so an A100 (108 multiprocessors at 1.41 GHz, 10 warps each) would take some 10^11 to 10^12
steps a second, 0.2 to 2 TB/s of bf16: an estimate.

No GPU has run it yet: a test runs its functions on a CPU, thread by thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from bagel_compress.codecs.ecq import unpack
from bagel_compress.codecs.ecq.decode import Stored

THREADS = 128  # THREADS of kernel.cu
_ALIGNMENT = 16


def source() -> str:
    """The kernel's CUDA C."""
    return files(__package__).joinpath("kernel.cu").read_text(encoding="utf-8")


def available() -> bool:
    """Whether this PyTorch can compile it: a CUDA build with run-time compilation."""
    return torch.version.cuda is not None and hasattr(torch.cuda, "_compile_kernel")


def runs(stored: Stored) -> Callable[[int, int, torch.Tensor], None]:
    """What decodes runs [first, last) of a weight into 1-D bf16 on its device, on the current stream."""
    device = stored.stream.device
    stream = stored.stream if stored.stream.data_ptr() % 4 == 0 else stored.stream.clone()
    table = torch.from_numpy(unpack.decoder(stored.book.frequencies).view("int32")).to(device)
    offsets = torch.from_numpy(stored.offsets).to(device)
    width = stored.column_steps.size
    columns = torch.from_numpy(stored.column_steps).to(device) if width else torch.zeros(1, device=device)

    def decode(first: int, last: int, out: torch.Tensor) -> None:
        target = out if out.data_ptr() % _ALIGNMENT == 0 else torch.empty_like(out)
        with torch.cuda.device(device):
            _kernel(device.index)(
                grid=(-(-(last - first) // THREADS), 1, 1),
                block=(THREADS, 1, 1),
                args=[
                    table, stream, stream.numel(), offsets, stored.book.low_bits, float(stored.step), columns, width,
                    stored.weights, first, last, target,
                ],
            )  # fmt: skip
        if target is not out:
            out.copy_(target)

    return decode


@cache
def _kernel(device: int) -> Any:
    return torch.cuda._compile_kernel(source(), "ecq_decode")
