"""Signed four-bit codes with a scale, and perhaps a zero point, per block of a row, on bf16 words.

code = round(w / scale + zero) to nearest even, kept in low..7; decoding gives bf16((code - zero) * scale). All in fp32.
"""

from __future__ import annotations

import numba
import numpy as np

from bagel_compress.codecs import constants
from bagel_compress.codecs.kernels.bf16_kernels import as_float, bf16_rounded
from bagel_compress.codecs.kernels.rows_kernels import ROUND_BITS, ROUND_MAGIC

RUN = 1024  # values of a row worked on at once, a multiple of every block: their arrays stay in L1
STRETCH = 32  # the smallest block
STEPS = np.float32(15)
WIDE = np.float32(constants.INT4_WIDE)
WIDE_ROOM = np.float32(0.95)  # of the reach of a block beyond WIDE, so that no decoded value overflows
LEAST_UNIT = np.float32(2.0**-100)  # of squares of weights: its inverse and squares of that are numbers

_strict = numba.njit(nogil=True, cache=True, error_model="numpy")  # no check of each divisor, so loops stay loops
_inlined = numba.njit(nogil=True, inline="always")
_sums = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})  # sums of errors, never codes


@_strict
def asymmetric_blocks(words, block, scales, zeros, tops):  # type: ignore[no-untyped-def]
    """words (R, K) uint16 -> scales that bf16 holds and zero points, (R, K / block) fp32, and tops, uint16.

    15 steps reach from the least value of the block to the largest, 0 included; tops are largest magnitude words.
    """
    for r in range(words.shape[0]):
        for b in range(tops.shape[1]):
            low, high = _ends(words[r, b * block : (b + 1) * block])
            top = max(low & np.uint16(0x7FFF), high)
            least, most = as_float(low), as_float(high)
            room = WIDE_ROOM if as_float(top) > WIDE else np.float32(1)
            scale = bf16_rounded((most / STEPS - least / STEPS) * room)
            scale = scale if scale > 0 else np.float32(1)
            scales[r, b], tops[r, b] = scale, top
            zeros[r, b] = min(max(np.rint(np.float32(-8) - least / scale), np.float32(-8)), np.float32(7))


@_strict
def _ends(x):  # type: ignore[no-untyped-def]
    """The words of the least and the largest of the values and 0.

    They are compared as words whose magnitude is turned over where the sign is set: those are ordered as values are.
    """
    low, high = np.int16(0), np.int16(0)
    for i in range(x.shape[0]):
        word = np.int16(x[i])
        key = np.int16(word ^ np.int16(np.int16(word >> np.int16(15)) & np.int16(0x7FFF)))
        low = np.int16(min(low, key))
        high = np.int16(max(high, key))
    return np.uint16(low ^ np.int16(0x7FFF)) if low < 0 else np.uint16(0), np.uint16(high)


@_strict
def int4_blocks(words, block, scales, zeros, bottoms, packed, sums):  # type: ignore[no-untyped-def]
    """words (R, K); scales, zero points, lowest codes (R, K / block) fp32 -> packed (R, K / 2) uint8, sums (R, 3).

    Packed are codes + 8, even columns low. Sums: w^2, error^2, and the number of errors that no rounding explains.
    Zero points and lowest codes of shape (0, 0) stand for 0 and -8 throughout.
    """
    shape = (RUN // STRETCH, STRETCH)
    scale, zero, bottom = np.empty(shape, np.float32), np.zeros(shape, np.float32), np.full(shape, -8, np.float32)
    s, z, low, codes = scale.reshape(-1), zero.reshape(-1), bottom.reshape(-1), np.empty(RUN, np.int32)
    for r in range(words.shape[0]):
        sums[r] = 0
        for first in range(0, words.shape[1], RUN):
            count = min(RUN, words.shape[1] - first)
            blocks = slice(first // block, (first + count) // block)
            _spread(scales[r, blocks], block, scale)
            if zeros.shape[0]:
                _spread(zeros[r, blocks], block, zero)
            if bottoms.shape[0]:
                _spread(bottoms[r, blocks], block, bottom)
            x, out = words[r, first : first + count], packed[r, first // 2 : (first + count) // 2]
            _codes(x, s, z, low, codes)
            for i in range(out.shape[0]):
                out[i] = np.uint8((codes[2 * i] + 8) | ((codes[2 * i + 1] + 8) << 4))
            unit = max(np.max(scales[r, blocks]), LEAST_UNIT)
            _measure(x, s, z, unit, codes, sums[r])


@_strict
def _spread(values, block, out):  # type: ignore[no-untyped-def]
    """A block's number for each of its values, in stretches (., STRETCH) whose loop the compiler unrolls."""
    parts = block // STRETCH
    for b in range(values.shape[0]):
        for k in range(b * parts, (b + 1) * parts):
            for i in range(STRETCH):
                out[k, i] = values[b]


@_strict
def _codes(x, scale, zero, bottom, codes):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        value = as_float(x[i]) / scale[i] + zero[i]
        value = min(max(value, bottom[i]), np.float32(7))
        codes[i] = np.float32(value + ROUND_MAGIC).view(np.int32) - ROUND_BITS


@_sums
def _measure(x, scale, zero, unit, codes, sums):  # type: ignore[no-untyped-def]
    """Squares are added in fp32, in units of the largest scale, so that they do not overflow."""
    ww, ee, beyond, inverse = np.float32(0), np.float32(0), np.int32(0), np.float32(1) / unit
    for i in range(x.shape[0]):
        w = as_float(x[i])
        e = w - bf16_rounded((np.float32(codes[i]) - zero[i]) * scale[i])
        ww += (w * inverse) * (w * inverse)
        ee += (e * inverse) * (e * inverse)
        # half a step; 2^-8 for bf16; and what is clipped: half a step, or all beyond 15 steps
        limit = np.float32(1.01) * scale[i] + np.float32(0.0041) * abs(w)
        limit += max(abs(w) - np.float32(7) * scale[i], np.float32(0))
        beyond = np.int32(beyond + np.int32(abs(e) > limit))
    square = np.float64(unit) * np.float64(unit)
    sums[0] += ww * square
    sums[1] += ee * square
    sums[2] += beyond
