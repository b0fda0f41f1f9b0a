"""DF11 decoding in Triton: the portable path for GPUs, and for any machine in Triton's interpreter.

One program decodes one block of 4096 code bytes with 512 lanes, a lane per 64-bit window. A first pass counts the codes
that start in each window, a prefix sum gives every lane its first weight, a second pass decodes again and stores. Both
use the decoder's table of up to six exponents per 12 bits; longer codes walk the stored tables. Triton has no scatter
into shared memory, so stores are not coalesced and the tables live in the cache: the CUDA kernel does both better.
Its speed was not measured on a GPU; its output was compared bit for bit in the interpreter.
"""

# mypy: disable-error-code="attr-defined,no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from bagel_compress.codecs.df11.layout import THREADS_PER_BLOCK


def decode(
    table: torch.Tensor,
    luts: torch.Tensor,
    stream: torch.Tensor,
    rest: torch.Tensor,
    positions: torch.Tensor,
    gaps: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fills bf16 `out` [weights]. All on one device: int64 `table` [4096] and `positions` [blocks + 1], else uint8."""
    blocks = positions.numel() - 1
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():  # a launch goes to the current device
        _decode_block[(blocks,)](
            table, luts, stream, rest, positions, gaps, out.view(torch.int16),
            stream.numel(), gaps.numel(), rest.numel(), luts.shape[0] - 1, LANES=THREADS_PER_BLOCK,
        )  # fmt: skip


@triton.jit
def _decode_block(
    table, luts, stream, rest, positions, gaps, out, stream_bytes, gap_bytes, weights, tables, LANES: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    window = block * LANES + tl.arange(0, LANES)
    high, low = _window_bits(stream, window * 8, stream_bytes)
    gap = _gap(gaps, window, gap_bytes)
    first, limit = tl.load(positions + block), tl.load(positions + block + 1)

    used = gap
    count = tl.zeros([LANES], tl.int64)
    while tl.min(used, 0) < 64:
        _, symbols, length = _lookup(table, luts, high, low, used, tables)
        count += tl.where(used < 64, symbols, 0)
        used += length

    index = first + tl.cumsum(count, 0) - count
    end = tl.minimum(index + count, tl.minimum(limit, weights))
    used = gap
    while tl.min(used, 0) < 64:
        entry, symbols, length = _lookup(table, luts, high, low, used, tables)
        for k in tl.static_range(6):
            at = index + k
            here = (k < symbols) & (used < 64) & (at < end)
            exponent = ((entry >> (8 * k)) & 255).to(tl.int16)
            byte = tl.load(rest + at, mask=here, other=0).to(tl.int16)
            word = ((byte & 0x80) << 8) | (exponent << 7) | (byte & 0x7F)
            tl.store(out + at, word, mask=here)
        index += tl.where(used < 64, symbols, 0)
        used += length


@triton.jit
def _window_bits(stream, byte, stream_bytes):
    """The 64 bits of each window and the 32 after them (in the high half), zeros behind the stream."""
    high = tl.zeros_like(byte).to(tl.uint64)
    low = high
    for k in tl.static_range(8):
        value = tl.load(stream + byte + k, mask=byte + k < stream_bytes, other=0).to(tl.uint64)
        high = high | (value << (56 - 8 * k))
    for k in tl.static_range(4):
        value = tl.load(stream + byte + 8 + k, mask=byte + 8 + k < stream_bytes, other=0).to(tl.uint64)
        low = low | (value << (56 - 8 * k))
    return high, low


@triton.jit
def _gap(gaps, window, gap_bytes):
    bit = window * 5
    pair = tl.load(gaps + bit // 8).to(tl.int64) << 8
    pair = pair | tl.load(gaps + bit // 8 + 1, mask=bit // 8 + 1 < gap_bytes, other=0).to(tl.int64)
    return (pair >> (11 - bit % 8)) & 31


@triton.jit
def _lookup(table, luts, high, low, used, tables):
    """Exponents, number of codes starting in the window, and bits of the next table entry at `used`."""
    shift = tl.minimum(used, 63).to(tl.uint64)
    bits = (high << shift) | ((low >> 1) >> (63 - shift))
    entry = tl.load(table + (bits >> 52).to(tl.int64)).to(tl.uint64, bitcast=True)
    length = (entry >> 60).to(tl.int64)
    long = length == 0
    exponent, long_length = _walk(luts, bits, tables, long)
    ends = ((entry >> 48) & 0xFFF).to(tl.int64)
    room = tl.maximum(64 - used, 1)
    inside = ends & ((1 << tl.minimum(room - 1, 12)) - 1)  # codes that end before the window does, so one more starts
    symbols = tl.where(length < room, _ones(ends), _ones(inside) + 1)
    entry = tl.where(long, exponent.to(tl.uint64), entry)
    return entry, tl.where(long, 1, symbols), tl.where(long, long_length, length)


@triton.jit
def _walk(luts, bits, tables, active):
    """Exponent and length of one code by the stored tables."""
    value = tl.load(luts + (bits >> 56).to(tl.int64), mask=active, other=0).to(tl.int64)
    for level in tl.static_range(1, 4):
        deeper = active & (value >= 240)
        byte = ((bits >> (56 - 8 * level)) & 255).to(tl.int64)
        value = tl.where(deeper, tl.load(luts + (256 - value) * 256 + byte, mask=deeper, other=0).to(tl.int64), value)
    length = tl.load(luts + tables * 256 + value, mask=active, other=1).to(tl.int64)
    return value, tl.maximum(length, 1)  # padding may lead nowhere; it must not loop


@triton.jit
def _ones(value):
    """One bits of a 12-bit number."""
    value = value - ((value >> 1) & 0x555)
    value = (value & 0x333) + ((value >> 2) & 0x333)
    return ((value + (value >> 4)) & 0xF0F) % 255
