"""NF4 on bf16 words: the codes of bitsandbytes' fp32 arithmetic, found with 16-bit integers.

bitsandbytes (0.50.2, CPU) gives w the code `#{k : w * (1/absmax) > MIDPOINTS[k]}`, in fp32, per block of 64. For a
fixed absmax that is a step function of the bf16 word of w, and scaling w and absmax by the same power of two changes
nothing: so 15 thresholds for each of the 128 mantissas of absmax, and words counted from a magnitude below absmax,
decide every code. 32 words are compared at once, no float is touched, and the result is exact. Blocks whose absmax is
so small or so large that a threshold or a reciprocal leaves the range of normal numbers take `_exact_codes`, the same
arithmetic spelled out.

What was written is then decoded from the packed bytes and compared with the weights.
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np

from bagel_compress.codecs.constants import NF4_BLOCK
from bagel_compress.codecs.kernels.bf16_kernels import as_float

LANES = 16  # fp32 numbers of a 512-bit register
TILE = 64  # blocks worked on at once: 8 KB of words, 8 KB of codes and 16 KB of decoded values stay in L1

# QLoRA, arXiv 2305.14314, appendix E: quantiles of the normal distribution, as bitsandbytes stores them in fp32.
CODE_BOOK = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
MIDPOINTS = (CODE_BOOK[1:] + CODE_BOOK[:-1]) / np.float32(2)
TINY = np.float32(1e-38)  # bitsandbytes clamps absmax to this before it takes the reciprocal
# Exponents (biased) of absmax for which every threshold, 2^-5 of absmax at least, and 1/absmax are normal fp32 numbers.
EXPONENTS = (8, 252)
# Half the widest gap of the code book is the largest error of an unclipped weight, in units of absmax; 1e-5 for fp32.
HALF_GAP = np.float32(max(CODE_BOOK[1:] - CODE_BOOK[:-1]) / 2 + 1e-5)
FLOOR = 8  # exponents below that of absmax where words are counted from: 2^-5 of absmax is above it, and code 7 below
MSE_STEP, MSE_STEPS = 8, 6  # clipping search: absmax words down in steps of 8/128..8/256, to about 0.8 of absmax

_strict = numba.njit(nogil=True, cache=True)
_inlined = numba.njit(nogil=True, inline="always")
_sums = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})  # sums of errors, never codes


@cache
def thresholds() -> np.ndarray:
    """(128, 15) int16: a word, as `_relative` sees it, above [mantissa of absmax, k] has a code above k."""
    magnitudes = np.arange(0x3F80 - FLOOR * 128, 0x4000, dtype=np.uint32)  # absmax is taken from [1, 2)
    relative = (magnitudes - magnitudes[0]).astype(np.int16)
    ordered, values = np.concatenate([~relative[::-1], relative]), _floats(magnitudes << 16)
    values = np.concatenate([-values[::-1], values])
    table = np.empty((128, 15), np.int16)
    for mantissa in range(128):
        absmax = _floats(np.array([(0x3F80 + mantissa) << 16], np.uint32))
        scaled = values * (np.float32(1) / absmax)
        table[mantissa] = ordered[np.searchsorted(scaled, MIDPOINTS, side="right")] - 1
    return table


@cache
def pair_values() -> np.ndarray:
    """(256,) uint64: the two fp32 code book values of a packed byte, high nibble first in memory."""
    return np.stack([np.repeat(CODE_BOOK, 16), np.tile(CODE_BOOK, 16)], 1).copy().view(np.uint64).reshape(-1)


def encode_blocks(
    words: np.ndarray, mse: bool, packed: np.ndarray, absmax: np.ndarray, energies: np.ndarray, errors: np.ndarray
) -> None:
    """Codes whole blocks and measures what was written, decoded from the packed bytes.

    words (B, 64) uint16 -> packed (B, 32) uint8, absmax (B,) fp32 (Inf or NaN where a block is not finite) and, per
    TILE blocks, energies (ceil(B/TILE), 3) fp64: sum of w^2, sum of e^2 and how far the worst error is beyond what
    rounding explains, in units of absmax (at most 0 where all is well). With c the code book values and e = w - c in
    units of absmax, errors (B, 3) fp32 are the sums of e^2, e*c and c^2 of each block; not taken where it is empty.
    """
    _encode(words, mse, thresholds(), MIDPOINTS, pair_values(), packed, absmax, energies, errors)


def encode_tail(words: np.ndarray) -> tuple[np.ndarray, np.float32, np.ndarray, np.ndarray]:
    """The last, short block, for which bitsandbytes divides by absmax (at least TINY).

    Packed bytes, absmax, energies (3,) and errors (3,) as of `encode_blocks`.
    """
    values = _floats(words.astype(np.uint32) << 16)
    absmax = np.maximum(np.abs(values).max(), TINY)
    with np.errstate(invalid="ignore"):  # a block that is not finite; the caller refuses it by its absmax
        u = values / absmax
    codes = np.searchsorted(MIDPOINTS, u, side="left").astype(np.uint8)
    even = np.append(codes, np.uint8(7)) if codes.size % 2 else codes  # the pad is the code of 0
    c = CODE_BOOK[codes]
    e = u - c
    errors = np.array([e @ e, e @ c, c @ c])
    unit = np.float64(absmax) ** 2
    energies = np.array([(u @ u) * unit, errors[0] * unit, abs(e).max() - HALF_GAP])
    return (even[0::2] << 4) | even[1::2], absmax, energies, errors


@_strict
def nested_noise(absmax: np.ndarray, stored: np.ndarray, errors: np.ndarray) -> float:
    """Sum of squared errors of blocks coded with absmax (B,) and decoded with stored (B,), from their errors (B, 3)."""
    total = 0.0
    for b in range(absmax.shape[0]):
        unit = np.float64(absmax[b])
        change = 1.0 - np.float64(stored[b]) / unit if unit > 0 else 0.0
        total += (errors[b, 0] + change * (2.0 * errors[b, 1] + change * errors[b, 2])) * unit * unit
    return total


def _floats(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


@_strict
def _encode(words, mse, table, midpoints, pairs, packed, absmax, energies, errors):  # type: ignore[no-untyped-def]
    tops, codes = np.empty(TILE, np.float32), np.empty((TILE, NF4_BLOCK), np.int16)
    values = np.empty((TILE, NF4_BLOCK), np.float32)
    for tile in range(energies.shape[0]):
        first, last = tile * TILE, min((tile + 1) * TILE, words.shape[0])
        block, scale = words[first:last], absmax[first:last]
        plain = _absmaxes(block, tops)
        scale[:] = tops[: last - first]
        if mse:
            _search(block, plain, tops, table, midpoints, pairs, codes, packed[first:last], values, scale)
        _tile_codes(block, plain, scale, table, midpoints, codes)
        _pack_and_measure(
            block, codes, values, pairs, tops, packed[first:last], scale, energies[tile], errors[first:last]
        )


@_strict
def _pack_and_measure(words, codes, values, pairs, tops, packed, absmax, energy, errors):  # type: ignore[no-untyped-def]
    """Packs a tile of codes, decodes the packed bytes and measures the error."""
    flat = packed.reshape(-1)
    _pack(codes.reshape(-1).view(np.uint32), flat)
    _unpack(flat, pairs, values.reshape(-1).view(np.uint64))
    _measure(words, values, tops, absmax, energy)
    if errors.shape[0]:
        _measure_blocks(words, values, absmax, errors)


# Below, `words`, `absmax` and the like are those of one tile and loops over its blocks lie inside of each function:
# numba passes an array as a dozen arguments and counts references to it, which took longer than the work on one block.


@_strict
def _absmaxes(words, tops):  # type: ignore[no-untyped-def]
    """Fills the tops, the largest magnitude of each block; whether all blocks suit `_code`."""
    plain = True
    for j in range(words.shape[0]):
        top = np.uint16(0)
        for i in range(NF4_BLOCK):
            top = np.uint16(max(top, np.uint16(words[j, i] & np.uint16(0x7FFF))))
        tops[j] = as_float(top)
        if not EXPONENTS[0] <= top >> 7 <= EXPONENTS[1]:
            plain = False
    return plain


@_strict
def _as_word(value):  # type: ignore[no-untyped-def]
    return np.uint16((np.float32(value).view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16))


@_strict
def _floor(scale):  # type: ignore[no-untyped-def]
    """The magnitude word from which `_relative` counts, for a scale given as a word."""
    return np.uint16(np.uint16((scale >> np.uint16(7)) - np.uint16(FLOOR)) << np.uint16(7))


@_strict
def _relative(word, floor):  # type: ignore[no-untyped-def]
    """Sign and magnitude -> two's complement, counted from the floor: int16 in the order of the values."""
    magnitude = np.uint16(word & np.uint16(0x7FFF))
    above = np.int16(np.uint16(max(magnitude, floor) - floor))
    return np.int16(above ^ np.int16(np.int16(word) >> np.int16(15)))


@_strict
def _code(w, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14):  # type: ignore[no-untyped-def]
    """How many of the ascending thresholds are below w, in 16-bit lanes.

    The signs of t - w are a thermometer: all ones, then all zeros. So bit k of their number is the parity of every
    2^k-th of them, and differences can be xored before anybody looks at their signs.
    """
    b3 = np.int16(t7 - w)
    b2 = np.int16(b3 ^ np.int16(t3 - w) ^ np.int16(t11 - w))
    b1 = np.int16(b2 ^ np.int16(t1 - w) ^ np.int16(t5 - w) ^ np.int16(t9 - w) ^ np.int16(t13 - w))
    low = np.int16(np.int16(t0 - w) ^ np.int16(t2 - w) ^ np.int16(t4 - w) ^ np.int16(t6 - w))
    high = np.int16(np.int16(t8 - w) ^ np.int16(t10 - w) ^ np.int16(t12 - w) ^ np.int16(t14 - w))
    b0 = np.int16(b1 ^ low ^ high)
    upper = np.uint16(np.uint16(b3) >> np.uint16(12) & np.uint16(8) | np.uint16(b2) >> np.uint16(13) & np.uint16(4))
    return np.int16(upper | np.uint16(b1) >> np.uint16(14) & np.uint16(2) | np.uint16(b0) >> np.uint16(15))


@_strict
def _tile_codes(words, plain, absmax, table, midpoints, codes):  # type: ignore[no-untyped-def]
    """The codes of a tile for the scales in `absmax`. Two loops: the compiler spoils the fast one beside the other."""
    if plain:
        for j in range(words.shape[0]):
            _block_codes(words, j, _as_word(absmax[j]), table, codes)
        return
    for j in range(words.shape[0]):
        scale = _as_word(absmax[j])
        if EXPONENTS[0] <= scale >> 7 <= EXPONENTS[1]:
            _block_codes(words, j, scale, table, codes)
        else:
            _exact_codes(words, j, absmax[j], midpoints, codes)


@_inlined
def _block_codes(words, j, scale, table, codes):  # type: ignore[no-untyped-def]
    m, floor = scale & 127, _floor(scale)
    t0, t1, t2, t3, t4 = table[m, 0], table[m, 1], table[m, 2], table[m, 3], table[m, 4]
    t5, t6, t7, t8, t9 = table[m, 5], table[m, 6], table[m, 7], table[m, 8], table[m, 9]
    t10, t11, t12, t13, t14 = table[m, 10], table[m, 11], table[m, 12], table[m, 13], table[m, 14]
    for i in range(NF4_BLOCK):
        codes[j, i] = _code(
            _relative(words[j, i], floor), t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14
        )


@_strict
def _exact_codes(words, j, absmax, midpoints, codes):  # type: ignore[no-untyped-def]
    inverse = np.float32(1) / max(absmax, TINY)
    for i in range(NF4_BLOCK):
        scaled = as_float(words[j, i]) * inverse
        code = 0
        for k in range(15):
            code += scaled > midpoints[k]
        codes[j, i] = code


@_strict
def _search(words, plain, tops, table, midpoints, pairs, codes, packed, values, scales):  # type: ignore[no-untyped-def]
    """Puts the bf16 scales of least squared error among those tried in place of absmax; `codes` and on are scratch.

    Tried are absmax, smaller scales, and for each the best scale for its codes, (w.c)/(c.c). A scale s saves
    s * (2 w.c - s c.c) of the energy of w. Where squares would leave fp32's range, absmax stays.
    """
    count, flat = words.shape[0], packed.reshape(-1)
    tried, most = np.empty(TILE, np.float32), np.zeros(TILE, np.float32)
    for step in range(MSE_STEPS):
        for j in range(count):
            tried[j] = as_float(_as_word(tops[j]) - step * MSE_STEP) if _searchable(tops[j]) else tops[j]
        for _ in range(2):
            _tile_codes(words, plain, tried[:count], table, midpoints, codes)
            _pack(codes.reshape(-1).view(np.uint32), flat)
            _unpack(flat, pairs, values.reshape(-1).view(np.uint64))
            _improve(words, values, tops, tried, most, scales)


@_strict
def _searchable(top):  # type: ignore[no-untyped-def]
    return (EXPONENTS[0] + 64) << 7 <= _as_word(top) <= (EXPONENTS[1] - 64) << 7


@_sums
def _improve(words, values, tops, tried, most, scales):  # type: ignore[no-untyped-def]
    """Keeps each scale tried that saves `most` so far, and leaves in `tried` the best scale for its codes."""
    for j in range(words.shape[0]):
        wc, cc = np.float32(0), np.float32(0)
        for i in range(NF4_BLOCK):
            c = values[j, i]
            wc += as_float(words[j, i]) * c
            cc += c * c
        if _searchable(tops[j]):
            saved = tried[j] * (np.float32(2) * wc - tried[j] * cc)
            if saved > most[j]:
                most[j], scales[j] = saved, tried[j]
            tried[j] = as_float(_as_word(wc / cc))


@_strict
def _pack(pairs, out):  # type: ignore[no-untyped-def]
    """Two int16 codes in a (little-endian) uint32 -> one byte, first code in the high nibble."""
    for i in range(out.shape[0]):
        out[i] = np.uint8((pairs[i] << 4) | (pairs[i] >> 16))


@_strict
def _unpack(packed, pairs, out):  # type: ignore[no-untyped-def]
    for i in range(packed.shape[0]):
        out[i] = pairs[packed[i]]


@_sums
def _measure(words, values, tops, absmax, energy):  # type: ignore[no-untyped-def]
    """Energies of a tile. Errors are taken in units of each block's scale, their squares in units of the largest, so
    that nothing overflows; sums stay in LANES partial sums to the end, for one register of each."""
    signal, noise = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    worst = np.full(LANES, -HALF_GAP, np.float32)
    unit = TINY
    for j in range(words.shape[0]):
        unit = max(unit, absmax[j])
    for j in range(words.shape[0]):
        scale = max(absmax[j], TINY)
        inverse, weight = np.float32(1) / scale, np.float32(np.float32(scale / unit) * np.float32(scale / unit))
        limit = HALF_GAP + max(tops[j] * inverse - np.float32(1), np.float32(0))  # a searched scale clips
        for i in range(LANES):
            u0, u1 = as_float(words[j, i]) * inverse, as_float(words[j, i + 16]) * inverse
            u2, u3 = as_float(words[j, i + 32]) * inverse, as_float(words[j, i + 48]) * inverse
            e0, e1, e2, e3 = u0 - values[j, i], u1 - values[j, i + 16], u2 - values[j, i + 32], u3 - values[j, i + 48]
            signal[i] += weight * (u0 * u0 + u1 * u1 + u2 * u2 + u3 * u3)
            noise[i] += weight * (e0 * e0 + e1 * e1 + e2 * e2 + e3 * e3)
            worst[i] = max(worst[i], max(max(abs(e0), abs(e1)), max(abs(e2), abs(e3))) - limit)
    square = np.float64(unit) * np.float64(unit)
    energy[0], energy[1], energy[2] = signal.sum() * square, noise.sum() * square, worst.max()


@_sums
def _measure_blocks(words, values, absmax, errors):  # type: ignore[no-untyped-def]
    for j in range(words.shape[0]):
        inverse = np.float32(1) / max(absmax[j], TINY)
        ee, ec, cc = np.float32(0), np.float32(0), np.float32(0)
        for i in range(NF4_BLOCK):
            c = values[j, i]
            e = as_float(words[j, i]) * inverse - c
            ee += e * e
            ec += e * c
            cc += c * c
        errors[j, 0], errors[j, 1], errors[j, 2] = ee, ec, cc
