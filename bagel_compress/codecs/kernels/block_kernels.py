"""Floats of four and eight bits with a coded scale per block of a row, on bf16 words: NVFP4, MXFP4, MXFP8.

Every scale is a byte; `table` (256,) fp32 holds what each byte stands for, everything that decoding multiplies a level
with included. Arithmetic in fp32, rounding to nearest even with integers and magic constants (see rows_kernels.py), so
that loops over the values of a block run in vector registers. Sums are of w^2, error^2 of what `decode` gives, and the
number of errors that no rounding explains.
"""

from __future__ import annotations

import numba
import numpy as np

from bagel_compress.codecs import constants
from bagel_compress.codecs.kernels.bf16_kernels import as_float, bf16_rounded
from bagel_compress.codecs.kernels.rows_kernels import FP8_MAX_BITS, FP8_NORMAL_BITS, SUBNORMAL_BITS, SUBNORMAL_MAGIC

FP4_MAX = np.float32(constants.FP4_MAX)
FP4_MAX_BITS, ONE_BITS = (np.int32(np.float32(x).view(np.int32)) for x in (6, 1))
HALVES_MAGIC = np.float32(2.0**22)  # one unit in its last place is 0.5, the step of e2m1 below 1
HALVES_BITS = np.int32(HALVES_MAGIC.view(np.int32))
FP4_BIAS, FP8_BIAS = np.int32(126 << 1), np.int32(120 << 3)  # of fp32 exponents against those of e2m1 and e4m3fn

_strict = numba.njit(nogil=True, cache=True, error_model="numpy")  # no check of each divisor, so loops stay loops
_inlined = numba.njit(nogil=True, inline="always")
_sums = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})  # sums of errors, never codes
RUN = 1024  # values of a row worked on at once, a multiple of every block: their arrays stay in L1


@_strict
def absmax_blocks(words, block, tops):  # type: ignore[no-untyped-def]
    """words (R, K) uint16 -> tops (R, K / block) uint16: largest magnitude word of each block."""
    for r in range(words.shape[0]):
        for b in range(tops.shape[1]):
            top = np.uint16(0)
            x = words[r, b * block : (b + 1) * block]
            for i in range(x.shape[0]):
                top = np.uint16(max(top, np.uint16(x[i] & np.uint16(0x7FFF))))
            tops[r, b] = top


@_strict
def fp4_blocks(words, block, scales, table, packed, sums):  # type: ignore[no-untyped-def]
    """words (R, K), scales (R, K / block) uint8 -> packed (R, K / 2), even columns low; sums (R, 3) fp64."""
    scale, codes = np.empty(RUN, np.float32), np.empty(RUN, np.int32)
    for r in range(words.shape[0]):
        sums[r] = 0
        for first in range(0, words.shape[1], RUN):
            count = min(RUN, words.shape[1] - first)
            _spread(scales[r], table, first // block, block, count, scale)
            _fp4_codes(words[r, first : first + count], scale, codes)
            out = packed[r, first // 2 : (first + count) // 2]
            for i in range(out.shape[0]):
                out[i] = np.uint8(codes[2 * i] | (codes[2 * i + 1] << 4))
            unit = table[np.max(scales[r, first // block : (first + count) // block])]
            _fp4_measure(words[r, first : first + count], scale, unit, codes, sums[r])


@_strict
def fp8_blocks(words, block, scales, table, codes, sums):  # type: ignore[no-untyped-def]
    """words (R, K), scales (R, K / block) uint8 -> codes (R, K) uint8 e4m3fn; sums (R, 3) fp64."""
    scale, found = np.empty(RUN, np.float32), np.empty(RUN, np.int32)
    for r in range(words.shape[0]):
        sums[r] = 0
        for first in range(0, words.shape[1], RUN):
            count = min(RUN, words.shape[1] - first)
            _spread(scales[r], table, first // block, block, count, scale)
            _fp8_codes(words[r, first : first + count], scale, found)
            out = codes[r, first : first + count]
            for i in range(count):
                out[i] = np.uint8(found[i])
            unit = table[np.max(scales[r, first // block : (first + count) // block])]
            fp8_measure(words[r, first : first + count], scale, unit, found, sums[r])


@_strict
def fp4_search(words, block, plain, offsets, low, high, table, best):  # type: ignore[no-untyped-def]
    """plain (R, B) uint8 -> best (R, B): of the scales plain + offsets, kept in low..high, that of least error^2.

    The first offset wins a tie. Errors are in units of the plain scale, so that squares neither overflow nor vanish.
    """
    scale, codes = np.empty(RUN, np.float32), np.empty(RUN, np.int32)
    errors, tried = np.empty(RUN, np.float32), np.empty(RUN // block, np.uint8)
    least = np.empty(RUN // block, np.float32)
    for r in range(words.shape[0]):
        for first in range(0, words.shape[1], RUN):
            count = min(RUN, words.shape[1] - first)
            blocks, start = count // block, first // block
            least[:] = np.inf
            for offset in offsets:
                for b in range(blocks):
                    tried[b] = min(max(np.int32(plain[r, start + b]) + offset, low), high)
                _spread(tried, table, 0, block, count, scale)
                _fp4_codes(words[r, first : first + count], scale, codes)
                _fp4_errors(words[r, first : first + count], scale, codes, errors)
                for b in range(blocks):
                    error = _sum(errors[b * block : (b + 1) * block], np.float32(1) / table[plain[r, start + b]])
                    if error < least[b]:
                        least[b] = error
                        best[r, start + b] = tried[b]


@_inlined
def _spread(scales, table, start, block, count, out):  # type: ignore[no-untyped-def]
    """The scale of each value of a run; blocks of 16 in a loop of their own, which the compiler unrolls."""
    if block == 16:
        for b in range(count // 16):
            value, run = table[scales[start + b]], out[b * 16 : b * 16 + 16]
            for i in range(16):
                run[i] = value
    else:
        for b in range(count // 32):
            value, run = table[scales[start + b]], out[b * 32 : b * 32 + 32]
            for i in range(32):
                run[i] = value


@_sums
def _sum(values, factor):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(values.shape[0]):
        total += (values[i] * factor) * (values[i] * factor)
    return total


@_strict
def _fp4_codes(x, scale, codes):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        word = x[i]
        bits = np.float32(as_float(word & np.uint16(0x7FFF)) / scale[i]).view(np.int32)
        bits = np.int32(min(bits, FP4_MAX_BITS))
        large = np.int32(np.int32(np.int32(bits + np.int32(0x1FFFFF)) + ((bits >> 22) & 1)) >> 22) - FP4_BIAS
        small = np.float32(np.int32(bits).view(np.float32) + HALVES_MAGIC).view(np.int32) - HALVES_BITS
        code = np.int32(small if bits < ONE_BITS else large)
        codes[i] = np.int32(code | np.int32((word >> 12) & 8))


@_inlined
def _fp4_decoded(code, scale):  # type: ignore[no-untyped-def]
    magnitude = np.int32(code & 7)
    large = np.int32(np.int32(magnitude << 22) + np.int32(FP4_BIAS << 22)).view(np.float32)
    value = bf16_rounded((np.float32(0.5) * np.float32(magnitude) if magnitude < 2 else large) * scale)
    return -value if code & 8 else value


@_strict
def _fp4_errors(x, scale, codes, errors):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        errors[i] = as_float(x[i]) - _fp4_decoded(codes[i], scale[i])


@_sums
def _fp4_measure(x, scale, unit, codes, sums):  # type: ignore[no-untyped-def]
    ww, ee, beyond, inverse = np.float32(0), np.float32(0), np.int32(0), np.float32(1) / unit
    for i in range(x.shape[0]):
        w = as_float(x[i])
        e = w - _fp4_decoded(codes[i], scale[i])
        ww += (w * inverse) * (w * inverse)
        ee += (e * inverse) * (e * inverse)
        # One bit after the leading one: half of the last is a quarter of the value at most; 2^-8 for bf16; half of
        # e2m1's and of bf16's smallest steps; and what is clipped.
        limit = np.float32(0.2545) * abs(w) + np.float32(0.2505) * scale[i]
        limit += max(abs(w) - FP4_MAX * scale[i], np.float32(0))
        beyond = np.int32(beyond + np.int32(abs(e) > limit))
    square = np.float64(unit) * np.float64(unit)
    sums[0] += ww * square
    sums[1] += ee * square
    sums[2] += beyond


@_strict
def _fp8_codes(x, scale, codes):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        word = x[i]
        bits = np.float32(as_float(word & np.uint16(0x7FFF)) / scale[i]).view(np.int32)
        bits = np.int32(min(bits, FP8_MAX_BITS))
        large = np.int32(np.int32(np.int32(bits + np.int32(0x7FFFF)) + ((bits >> 20) & 1)) >> 20) - FP8_BIAS
        small = np.float32(np.int32(bits).view(np.float32) + SUBNORMAL_MAGIC).view(np.int32) - SUBNORMAL_BITS
        code = np.int32(small if bits < FP8_NORMAL_BITS else large)
        codes[i] = np.int32(code | np.int32((word >> 8) & 0x80))


@_inlined
def _fp8_decoded(code, scale):  # type: ignore[no-untyped-def]
    magnitude = np.int32(code & 0x7F)
    large = np.int32(np.int32(magnitude << 20) + np.int32(FP8_BIAS << 20)).view(np.float32)
    value = bf16_rounded((np.float32(2.0**-9) * np.float32(magnitude) if magnitude < 8 else large) * scale)
    return -value if code & 0x80 else value


@_sums
def fp8_measure(x, scale, unit, codes, sums):  # type: ignore[no-untyped-def]
    ww, ee, beyond, inverse = np.float32(0), np.float32(0), np.int32(0), np.float32(1) / unit
    for i in range(x.shape[0]):
        w = as_float(x[i])
        e = w - _fp8_decoded(codes[i], scale[i])
        ww += (w * inverse) * (w * inverse)
        ee += (e * inverse) * (e * inverse)
        # Three bits after the leading one: half of the last is 2^-4 of the value; 2^-8 for bf16; half of e4m3fn's and
        # of bf16's smallest steps; and what is clipped.
        limit = np.float32(0.0665) * abs(w) + np.float32(0.001) * scale[i]
        limit += max(abs(w) - np.float32(448) * scale[i], np.float32(0))
        beyond = np.int32(beyond + np.int32(abs(e) > limit))
    square = np.float64(unit) * np.float64(unit)
    sums[0] += ww * square
    sums[1] += ee * square
    sums[2] += beyond
