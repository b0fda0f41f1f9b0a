"""Double quantisation of NF4's absmax, byte for byte as bitsandbytes 0.50.2 does it on one CPU thread.

Three facts of that version are reproduced here, none of which is in its Python source:
- the offset is `absmax.mean()`, summed in fp32 by torch: 8 lanes of 4 partial sums in a cascade of 4 levels. With more
  threads torch adds in another order and the last bit may differ: bitsandbytes' own bytes depend on its threads, these
  do not.
- `quantize_blockwise` looks the code up in a table of 65536 steps of [-1, 1] instead of comparing with midpoints, so a
  value near a midpoint takes the code of its step.
- a block whose values are all zero gets code 0 (and absmax 0).
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np

from bagel_compress.codecs.constants import NF4_NESTED_BLOCK

LANES, PARTIALS, LEVELS = 8, 4, 4  # torch SumKernel.cpp: Vectorized<float>::size() of AVX2, ilp_factor, num_levels
STEPS = 65536  # kLUTSize in bitsandbytes csrc/cpu_ops.cpp

_strict = numba.njit(nogil=True, cache=True)


def quantize_absmax(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """absmax (B,) fp32 -> codes (B,) uint8, nested absmax (ceil(B/256),) fp32, offset (Inf if the sum is)."""
    offset = np.float32(_sum(absmax) / np.float32(absmax.size))
    codes = np.zeros(absmax.size, np.uint8)
    nested = np.empty(-(-absmax.size // NF4_NESTED_BLOCK), np.float32)
    if np.isfinite(offset):
        _quantize(absmax - offset, _steps(), codes, nested)
    return codes, nested, offset


def dequantize_absmax(codes: np.ndarray, nested: np.ndarray, offset: np.float32) -> np.ndarray:
    """The fp32 absmax that a loader gets back: dynamic_map()[code] * nested + offset, rounded after each step."""
    return dynamic_map()[codes] * np.repeat(nested, NF4_NESTED_BLOCK)[: codes.size] + offset


@cache
def dynamic_map() -> np.ndarray:
    """(256,) fp32: bitsandbytes' signed dynamic 8-bit map (arXiv 2110.02861), sorted.

    Seven decades 10^-6 .. 10^0; decade i has 2^i values of each sign, the centres of equal cells of [0.1, 1].
    """
    values = [0.0, 1.0]
    for decade in range(7):
        cells = 2**decade + 1
        edges = _linspace_tenth_to_one(cells)
        centres = (edges[:-1] + edges[1:]) / np.float32(2)
        scale = np.float32(10 ** (decade - 6))
        values += (scale * centres).tolist() + (-scale * centres).tolist()
    return np.sort(np.array(values, np.float32))


def _linspace_tenth_to_one(count: int) -> np.ndarray:
    """torch.linspace(0.1, 1, count) in fp32, which fixes the map's last bits."""
    import torch

    edges: np.ndarray = torch.linspace(0.1, 1, count, dtype=torch.float32).numpy()
    return edges


@cache
def _steps() -> np.ndarray:
    """(65536,) uint8: the code of each step of [-1, 1]."""
    book = dynamic_map()
    midpoints = np.float32(0.5) * (book[:-1] + book[1:])
    index = np.arange(STEPS, dtype=np.float32)
    values = np.float32(-1) + (np.float32(2) * index) / np.float32(STEPS - 1)
    return np.searchsorted(midpoints, values, side="left").astype(np.uint8)


@_strict
def _quantize(values, steps, codes, nested):  # type: ignore[no-untyped-def]
    for b in range(nested.shape[0]):
        block = values[b * NF4_NESTED_BLOCK : (b + 1) * NF4_NESTED_BLOCK]
        out = codes[b * NF4_NESTED_BLOCK : (b + 1) * NF4_NESTED_BLOCK]
        top = np.float32(0)
        for i in range(block.shape[0]):
            top = max(top, abs(block[i]))
        nested[b] = top
        if top == 0:
            out[:] = 0
            continue
        inverse = np.float32(1) / top
        for i in range(block.shape[0]):
            x = min(max(block[i] * inverse, np.float32(-1)), np.float32(1))
            step = (x + np.float32(1)) * np.float32(0.5) * np.float32(STEPS - 1) + np.float32(0.5)
            out[i] = steps[np.int64(step)] if step >= 0 else 0  # NaN: absmax so small that 1/top is infinite


@_strict
def _sum(x):  # type: ignore[no-untyped-def]
    """torch.sum of a contiguous fp32 vector on one thread."""
    lanes = LANES if x.shape[0] >= LANES else 1
    width = PARTIALS * lanes
    rows = x.shape[0] // width
    power = max(4, _ceil_log2(rows) // LEVELS)
    acc = np.zeros((LEVELS, width), np.float32)
    i = 0
    while i + (1 << power) <= rows:
        for _ in range(1 << power):
            _add(acc[0], x[i * width : (i + 1) * width])
            i += 1
        for level in range(1, LEVELS):
            _add(acc[level], acc[level - 1])
            acc[level - 1] = 0
            if i & (((1 << power) - 1) << (level * power)):
                break
    while i < rows:
        _add(acc[0], x[i * width : (i + 1) * width])
        i += 1
    for level in range(1, LEVELS):
        _add(acc[0], acc[level])
    return _fold(x, acc[0], lanes)


@_strict
def _fold(x, acc, lanes):  # type: ignore[no-untyped-def]
    """Adds the vectors left over, the partial sums of each lane, then the scalars left over and the lanes."""
    vectors = x.shape[0] // lanes
    for i in range(vectors - vectors % PARTIALS, vectors):
        _add(acc[:lanes], x[i * lanes : (i + 1) * lanes])
    for partial in range(1, PARTIALS):
        _add(acc[:lanes], acc[partial * lanes : (partial + 1) * lanes])
    total = np.float32(0)
    for i in range(vectors * lanes, x.shape[0]):
        total += x[i]
    for lane in range(lanes):
        total += acc[lane]
    return total


@_strict
def _add(total, terms):  # type: ignore[no-untyped-def]
    for i in range(total.shape[0]):
        total[i] += terms[i]


@_strict
def _ceil_log2(n):  # type: ignore[no-untyped-def]
    power = 0
    while (1 << power) < n:
        power += 1
    return power
