"""NF4 on bf16 words: the codes of bitsandbytes' fp32 arithmetic, found with 16-bit integer compares.

bitsandbytes (0.50.2, CPU) gives w the code `#{k : w * (1/absmax) > MIDPOINTS[k]}`, in fp32, per block of 64. For a
fixed absmax that is a step function of the bf16 word of w, and scaling w and absmax by the same power of two changes
nothing: so 15 thresholds for each of the 128 mantissas of absmax, plus a shift of the exponent, decide every code.
Sixteen words or more are compared at once, no float is touched, and the result is exact. Blocks whose absmax is so
small or so large that a threshold or a reciprocal leaves the range of normal numbers take `_exact_codes`, the same
arithmetic spelled out.

What was written is then decoded from the packed bytes and compared with the weights.
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np

BLOCK = 64  # weights per absmax, the bitsandbytes default
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
MSE_STEP, MSE_STEPS = 8, 6  # clipping search: absmax words down in steps of 8/128..8/256, to about 0.8 of absmax

_strict = numba.njit(nogil=True, cache=True)
_sums = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})  # sums of errors, never codes


@cache
def thresholds() -> np.ndarray:
    """(128, 15) int16: a word in order (see `_ordered`) above [mantissa, k] has a code above k; absmax in [1, 2)."""
    positive = np.arange(0x3F80 - 7 * 128, 0x4000).astype(np.int16)  # magnitudes 2^-7 .. 2 contain every threshold
    ordered = np.concatenate([~positive[::-1], positive])
    magnitude = _floats(positive.astype(np.uint32) << 16)
    values = np.concatenate([-magnitude[::-1], magnitude])
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


def encode_blocks(words: np.ndarray, mse: bool, packed: np.ndarray, absmax: np.ndarray, sums: np.ndarray) -> None:
    """Codes whole blocks.

    words (B, 64) uint16 -> packed (B, 32) uint8, absmax (B,) fp32 (Inf or NaN where a block is not finite) and sums
    (B, 5) fp32 over each block: u^2, e^2, e*c, c^2 and the number of errors that no rounding explains, with u the
    weights in units of absmax, c the code book values decoded from the packed bytes and e = u - c.
    """
    if mse:
        _encode_searching(words, thresholds(), CODE_BOOK, MIDPOINTS, pair_values(), packed, absmax, sums)
    else:
        _encode_plain(words, thresholds(), MIDPOINTS, pair_values(), packed, absmax, sums)


def encode_tail(words: np.ndarray) -> tuple[np.ndarray, np.float32, np.ndarray]:
    """The last, short block, for which bitsandbytes divides by absmax (at least TINY): packed bytes, absmax, sums."""
    values = _floats(words.astype(np.uint32) << 16)
    absmax = np.maximum(np.abs(values).max(), TINY)
    with np.errstate(invalid="ignore"):  # a block that is not finite; the caller refuses it by its absmax
        u = values / absmax
    codes = np.searchsorted(MIDPOINTS, u, side="left").astype(np.uint8)
    even = np.append(codes, np.uint8(7)) if codes.size % 2 else codes  # the pad is the code of 0
    c = CODE_BOOK[codes]
    e = u - c
    sums = np.array([u @ u, e @ e, e @ c, c @ c, (abs(e) > HALF_GAP).sum()], np.float32)
    return (even[0::2] << 4) | even[1::2], absmax, sums


def _floats(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


@_strict
def _encode_plain(words, table, midpoints, pairs, packed, absmax, sums):  # type: ignore[no-untyped-def]
    codes = np.empty((TILE, BLOCK), np.int16)
    values = np.empty((TILE, BLOCK), np.float32)
    for first in range(0, words.shape[0], TILE):
        count = min(TILE, words.shape[0] - first)
        fast = _absmaxes(words, first, count, absmax)
        _tile_codes(words, first, count, fast, absmax, table, midpoints, codes)
        _store(words, codes, values, pairs, first, count, False, packed, absmax, sums)


@_strict
def _encode_searching(words, table, book, midpoints, pairs, packed, absmax, sums):  # type: ignore[no-untyped-def]
    codes = np.empty((TILE, BLOCK), np.int16)
    values = np.empty((TILE, BLOCK), np.float32)
    for first in range(0, words.shape[0], TILE):
        count = min(TILE, words.shape[0] - first)
        fast = _absmaxes(words, first, count, absmax)
        for j in range(count):
            scale = _best_scale(words, first + j, table, _as_word(absmax[first + j]), book, codes, j)
            absmax[first + j] = _as_float(scale)
        _tile_codes(words, first, count, fast, absmax, table, midpoints, codes)
        _store(words, codes, values, pairs, first, count, True, packed, absmax, sums)


@_strict
def _store(words, codes, values, pairs, first, count, clipped, packed, absmax, sums):  # type: ignore[no-untyped-def]
    """Packs a tile of codes, decodes the packed bytes and measures the error."""
    tile = packed[first : first + count].reshape(-1)
    _pack(codes.reshape(-1).view(np.uint32), tile)
    _unpack(tile, pairs, values.reshape(-1).view(np.uint64))
    for j in range(count):
        scale = absmax[first + j]
        beyond = np.float32(0)
        if clipped:
            beyond = max(_as_float(_absmax_word(words, first + j)) / max(scale, TINY) - np.float32(1), beyond)
        _measure(words, first + j, values, j, scale, beyond, sums)


# Below, a block is `words[b]` and its codes are `codes[j]`: indices instead of slices, because numba counts references
# to a slice with atomic operations, which took longer than the work on its 64 elements.


@_strict
def _absmaxes(words, first, count, absmax):  # type: ignore[no-untyped-def]
    """Fills absmax of a tile's blocks; whether all of them, or a scale found by searching, suit `_fast_codes`."""
    fast = True
    for b in range(first, first + count):
        top = _absmax_word(words, b)
        absmax[b] = _as_float(top)
        fast &= EXPONENTS[0] <= top >> 7 <= EXPONENTS[1]
    return fast


@_strict
def _absmax_word(words, b):  # type: ignore[no-untyped-def]
    top = np.uint16(0)
    for i in range(BLOCK):
        top = np.uint16(max(top, np.uint16(words[b, i] & np.uint16(0x7FFF))))
    return top


@_strict
def _as_float(word):  # type: ignore[no-untyped-def]
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@_strict
def _ordered(word):  # type: ignore[no-untyped-def]
    """Sign and magnitude -> two's complement: int16 in the order of the values."""
    v = np.int16(word)
    return np.int16(v ^ np.int16((v >> 15) & 0x7FFF))


@_strict
def _tile_codes(words, first, count, fast, absmax, table, midpoints, codes):  # type: ignore[no-untyped-def]
    """The codes of a tile for the scales in `absmax`. Two loops: the compiler spoils the fast one beside the other."""
    if fast:
        for j in range(count):
            _fast_codes(words, first + j, table, _as_word(absmax[first + j]), codes, j)
        return
    for j in range(count):
        top = _as_word(absmax[first + j])
        if EXPONENTS[0] <= top >> 7 <= EXPONENTS[1]:
            _fast_codes(words, first + j, table, top, codes, j)
        else:
            _exact_codes(words, first + j, absmax[first + j], midpoints, codes, j)


@_strict
def _fast_codes(words, b, table, top, codes, j):  # type: ignore[no-untyped-def]
    """15 thresholds in registers: written out, because only so does the compiler keep 16-bit lanes."""
    m, shift = top & 127, np.int16(((top >> 7) - 127) << 7)
    t0, t1, t2 = np.int16(table[m, 0] - shift), np.int16(table[m, 1] - shift), np.int16(table[m, 2] - shift)
    t3, t4, t5 = np.int16(table[m, 3] - shift), np.int16(table[m, 4] - shift), np.int16(table[m, 5] - shift)
    t6, t7, t8 = np.int16(table[m, 6] - shift), np.int16(table[m, 7] + shift), np.int16(table[m, 8] + shift)
    t9, t10, t11 = np.int16(table[m, 9] + shift), np.int16(table[m, 10] + shift), np.int16(table[m, 11] + shift)
    t12, t13, t14 = np.int16(table[m, 12] + shift), np.int16(table[m, 13] + shift), np.int16(table[m, 14] + shift)
    for i in range(BLOCK):
        w = _ordered(words[b, i])
        c = np.int16(w > t0)
        c = np.int16(c + np.int16(w > t1))
        c = np.int16(c + np.int16(w > t2))
        c = np.int16(c + np.int16(w > t3))
        c = np.int16(c + np.int16(w > t4))
        c = np.int16(c + np.int16(w > t5))
        c = np.int16(c + np.int16(w > t6))
        c = np.int16(c + np.int16(w > t7))
        c = np.int16(c + np.int16(w > t8))
        c = np.int16(c + np.int16(w > t9))
        c = np.int16(c + np.int16(w > t10))
        c = np.int16(c + np.int16(w > t11))
        c = np.int16(c + np.int16(w > t12))
        c = np.int16(c + np.int16(w > t13))
        c = np.int16(c + np.int16(w > t14))
        codes[j, i] = c


@_strict
def _exact_codes(words, b, absmax, midpoints, codes, j):  # type: ignore[no-untyped-def]
    inverse = np.float32(1) / max(absmax, TINY)
    for i in range(BLOCK):
        scaled = _as_float(words[b, i]) * inverse
        code = 0
        for k in range(15):
            code += scaled > midpoints[k]
        codes[j, i] = code


@_strict
def _best_scale(words, b, table, top, book, codes, j):  # type: ignore[no-untyped-def]
    """The bf16 word of the scale of least squared error among those tried; `codes[j]` is scratch.

    Tried are absmax, smaller scales, and for each the best scale for its codes, (w.c)/(c.c). A scale s saves
    s * (2 w.c - s c.c) of the energy of w. Where squares would leave fp32's range, absmax stays.
    """
    best, scale = np.float32(0), top
    if (EXPONENTS[0] + 64) << 7 <= top <= (EXPONENTS[1] - 64) << 7:
        for step in range(MSE_STEPS):
            word = np.uint16(top - step * MSE_STEP)
            for _ in range(2):
                _fast_codes(words, b, table, word, codes, j)
                wc, cc = _products(words, b, codes, j, book)
                saved = _as_float(word) * (2 * wc - _as_float(word) * cc)
                if saved > best:
                    best, scale = saved, word
                word = _as_word(wc / cc)
    return scale


@_strict
def _as_word(value):  # type: ignore[no-untyped-def]
    return np.uint16((np.float32(value).view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16))


@_sums
def _products(words, b, codes, j, book):  # type: ignore[no-untyped-def]
    wc, cc = np.float32(0), np.float32(0)
    for i in range(BLOCK):
        c = book[codes[j, i]]
        wc += _as_float(words[b, i]) * c
        cc += c * c
    return wc, cc


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
def _measure(words, b, values, j, absmax, beyond_scale, sums):  # type: ignore[no-untyped-def]
    """In units of the scale, so that nothing overflows: u = w/scale against its code book value c."""
    inverse = np.float32(1) / max(absmax, TINY)
    limit = HALF_GAP + beyond_scale
    uu, ee, ec, cc, beyond = np.float32(0), np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(BLOCK):
        u, c = _as_float(words[b, i]) * inverse, values[j, i]
        e = u - c
        uu += u * u
        ee += e * e
        ec += e * c
        cc += c * c
        beyond += np.float32(1) if abs(e) > limit else np.float32(0)  # fp32 as the sums are: as many lanes
    sums[b, 0], sums[b, 1], sums[b, 2], sums[b, 3], sums[b, 4] = uu, ee, ec, cc, beyond
