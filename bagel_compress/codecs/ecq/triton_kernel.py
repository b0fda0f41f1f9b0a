"""ecq decoding in Triton: the portable path for GPUs, and for any machine in Triton's interpreter.

A lane decodes a run, one weight per turn of the loop; all lanes take the same steps. Stores are 2 bytes wide and not
coalesced, and the table lives in the cache: the CUDA kernel does both better. Its speed was not measured on a GPU; its
output was compared bit for bit in the interpreter.
"""

# mypy: disable-error-code="attr-defined,no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
import triton
import triton.language as tl

from bagel_compress.codecs.ecq import unpack
from bagel_compress.codecs.ecq.decode import Stored
from bagel_compress.codecs.ecq.layout import RUN

LANES = 32


def runs(stored: Stored) -> Callable[[int, int, torch.Tensor], None]:
    """What decodes runs [first, last) of a weight into 1-D bf16 on its device, on the current stream."""
    device, width = stored.stream.device, stored.column_steps.size
    table = torch.from_numpy(unpack.decoder(stored.book.frequencies).view("int32")).to(device)
    offsets = torch.from_numpy(stored.offsets).to(device)
    steps = torch.from_numpy(stored.column_steps if width else np.array([stored.step])).to(device)

    def decode(first: int, last: int, out: torch.Tensor) -> None:
        with torch.cuda.device(device) if out.is_cuda else nullcontext():  # a launch goes to the current device
            _decode[(triton.cdiv(last - first, LANES),)](
                table, stored.stream, stored.stream.numel(), offsets, stored.book.low_bits, steps, steps.numel(),
                stored.weights, first, last, out.view(torch.int16), RUN=RUN, LANES=LANES,
            )  # fmt: skip

    return decode


@triton.jit
def _decode(
    table, stream, stream_bytes, offsets, low_bits, steps, width, weights, first, last, out,
    RUN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    run = first + tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    active = run < last
    start = tl.load(offsets + run, mask=active, other=0)
    end = tl.load(offsets + run + 1, mask=active, other=0)
    size = tl.where(active, tl.minimum(weights - run * RUN, RUN), 0)
    plane = (size + 7) // 8
    header = _bytes(stream, start, stream_bytes, 2)
    state = header & 4095
    at = 8 * (start + 2 + low_bits * plane) + (header >> 12)
    for i in range(tl.max(size, 0)):
        here = i < size
        entry = tl.load(table + state, mask=here, other=0).to(tl.int64)
        symbol, bits = entry & 255, (entry >> 8) & 255
        fresh = _bytes(stream, at // 8, stream_bytes, 3) >> (at % 8)
        state = tl.where(here, ((entry >> 16) & 65535) + (fresh & ((tl.full([LANES], 1, tl.int64) << bits) - 1)), state)
        at += tl.where(here, bits, 0)
        code = symbol - 127
        low = tl.zeros([LANES], tl.int64)
        for bit in range(low_bits):
            byte = _bytes(stream, start + 2 + bit * plane + i // 8, stream_bytes, 1)
            low += ((byte >> (i % 8)) & 1) << bit
        step = tl.load(steps + (run * RUN + i) % width, mask=here, other=0.0)
        word = _rounded(((code << low_bits) + low).to(tl.float32) * step)
        escaping = here & (symbol == 255)
        end -= tl.where(escaping, 2, 0)
        word = tl.where(escaping, _bytes(stream, end, stream_bytes, 2), word)
        tl.store(out + (run - first) * RUN + i, word.to(tl.int16), mask=here)


@triton.jit
def _bytes(stream, at, stream_bytes, count: tl.constexpr):
    """`count` bytes as one little-endian number, zeros outside of the stream."""
    value = tl.zeros_like(at)
    for k in tl.static_range(count):
        inside = (at + k >= 0) & (at + k < stream_bytes)
        value = value | (tl.load(stream + at + k, mask=inside, other=0).to(tl.int64) << (8 * k))
    return value


@triton.jit
def _rounded(value):
    """fp32 -> the bf16 word, to nearest even."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
