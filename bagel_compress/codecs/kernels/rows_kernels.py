"""FP8 and INT8 with one scale per row, on bf16 words. Arithmetic in fp32, rounding to nearest even.

Rounding is done with integers and with magic constants (adding 1.5 * 2^k leaves the rounded value in the low bits), and
counts are kept in 32 bits, so that every loop runs in vector registers. Functions marked `_strict` are exact; `_sums`
may reorder sums of errors. What was written is decoded from the bytes, rounded to bf16 as `decode` does, and compared
with the weights.
"""

from __future__ import annotations

import numba
import numpy as np

from bagel_compress.codecs import constants
from bagel_compress.codecs.kernels.bf16_kernels import as_float, bf16_rounded

FP8_MAX = np.float32(constants.FP8_MAX)
FP8_NORMAL = np.float32(2.0**-6)  # smallest normal e4m3fn number; subnormals are multiples of 2^-9
SUBNORMAL_MAGIC = np.float32(2.0**14)  # one unit in its last place is 2^-9
ROUND_MAGIC = np.float32(1.5 * 2**23)  # one unit in its last place is 1; 1.5 for either sign
HALF_NORMAL = np.float32(2.0**-14)  # smallest normal fp16 number; subnormals are multiples of 2^-24
HALF_MAGIC = np.float32(0.5)  # one unit in its last place, upwards, is 2^-24
PER_127 = np.float32(7.874015718698502e-3)  # 1/127 as bitsandbytes' int8_vectorwise_dequant writes it
# The same numbers as fp32 bits, which order and subtract like integers.
FP8_MAX_BITS, FP8_NORMAL_BITS, SUBNORMAL_BITS, ROUND_BITS = (
    np.int32(x.view(np.int32)) for x in (FP8_MAX, FP8_NORMAL, SUBNORMAL_MAGIC, ROUND_MAGIC)
)

_strict = numba.njit(nogil=True, cache=True)
_sums = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})


@_strict
def absmax_rows(words, tops):  # type: ignore[no-untyped-def]
    """words (R, K) uint16 -> tops (R,) uint16: largest magnitude word of each row."""
    for r in range(words.shape[0]):
        x, top = words[r], np.uint16(0)
        for i in range(x.shape[0]):
            top = np.uint16(max(top, np.uint16(x[i] & np.uint16(0x7FFF))))
        tops[r] = top


@_strict
def fp8_rows(words, scales, codes, sums):  # type: ignore[no-untyped-def]
    """words (R, K) and scales (R,) fp32 -> codes (R, K) uint8 e4m3fn and sums (R, 3) fp32.

    Sums are in units of the scale: w^2, error^2, and the number of errors that no rounding explains.
    """
    for r in range(words.shape[0]):
        _fp8_codes(words[r], scales[r], codes[r])
        fp8_measure(words[r], scales[r], codes[r], sums[r])


@_strict
def fp8_search(words, scales, noise):  # type: ignore[no-untyped-def]
    """words (R, K) and scales (R, C) to try -> noise (R, C): error^2 of each."""
    codes, sums = np.empty(words.shape[1], np.uint8), np.empty(3, np.float32)
    for r in range(words.shape[0]):
        for c in range(scales.shape[1]):
            _fp8_codes(words[r], scales[r, c], codes)
            fp8_measure(words[r], scales[r, c], codes, sums)
            noise[r, c] = np.float64(sums[1]) * scales[r, c] * scales[r, c]


@_strict
def int8_rows(words, scales, codes, sums):  # type: ignore[no-untyped-def]
    """words (R, K) and scales (R,) fp32 -> codes (R, K) int8 and sums (R, 3) fp32. A scale is what code 127 stands for.

    Sums: w^2, error^2, and the number of errors that no rounding explains.
    """
    for r in range(words.shape[0]):
        _int8_codes(words[r], scales[r], codes[r])
        int8_measure(words[r], scales[r], codes[r], sums[r])


@_strict
def int8_search(words, scales, noise):  # type: ignore[no-untyped-def]
    """words (R, K) and scales (R, C) to try -> noise (R, C): error^2 of each."""
    codes, sums = np.empty(words.shape[1], np.int8), np.empty(3, np.float32)
    for r in range(words.shape[0]):
        for c in range(scales.shape[1]):
            _int8_codes(words[r], scales[r, c], codes)
            int8_measure(words[r], scales[r, c], codes, sums)
            noise[r, c] = sums[1]


@_strict
def half_of(word):  # type: ignore[no-untyped-def]
    """The fp16 rounding of a bf16 word, as fp32; exact from 2^-14 up to fp16's range."""
    value = as_float(word)
    magnitude = abs(value)
    small = (magnitude + HALF_MAGIC) - HALF_MAGIC
    return np.copysign(small if magnitude < HALF_NORMAL else magnitude, value)


@_strict
def _fp8_codes(x, scale, codes):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        bits = np.float32(as_float(x[i] & np.uint16(0x7FFF)) / scale).view(np.int32)
        bits = np.int32(min(bits, FP8_MAX_BITS))
        large = np.int32(np.int32(np.int32(bits + np.int32(0x7FFFF)) + ((bits >> 20) & 1)) >> 20) - np.int32(120 << 3)
        small = np.float32(np.int32(bits).view(np.float32) + SUBNORMAL_MAGIC).view(np.int32) - SUBNORMAL_BITS
        code = np.int32(small if bits < FP8_NORMAL_BITS else large)
        codes[i] = np.uint8(code | ((x[i] >> 8) & 0x80))


@_sums
def fp8_measure(x, scale, codes, sums):  # type: ignore[no-untyped-def]
    inverse = np.float32(1) / scale
    smallest = np.float32(0.001) + np.float32(2.0**-134) * inverse  # half of e4m3fn's and of bf16's subnormal steps
    uu, ee, beyond = np.float32(0), np.float32(0), np.int32(0)
    for i in range(x.shape[0]):
        u = as_float(x[i]) * inverse
        e = u - bf16_rounded(_fp8_value(codes[i]) * scale) * inverse
        uu += u * u
        ee += e * e
        # e4m3fn has 3 bits after the leading one: half of the last is 2^-4 of the value, and 2^-8 for bf16
        limit = abs(u) * np.float32(0.0665) + smallest + max(abs(u) - FP8_MAX, np.float32(0))
        beyond = np.int32(beyond + np.int32(abs(e) > limit))
    sums[0], sums[1], sums[2] = uu, ee, beyond


@_strict
def _fp8_value(code):  # type: ignore[no-untyped-def]
    magnitude = np.int32(code & 0x7F)
    small = np.float32(magnitude) * np.float32(2.0**-9)
    large = np.int32(np.int32(magnitude << 20) + np.int32(120 << 23)).view(np.float32)
    value = small if magnitude < 8 else large
    return -value if code & 0x80 else value


@_strict
def _int8_codes(x, scale, codes):  # type: ignore[no-untyped-def]
    factor = (np.float32(1) / scale) * np.float32(127) if scale > 0 else np.float32(0)  # as torch divides a number
    for i in range(x.shape[0]):
        v = half_of(x[i]) * factor
        v = min(max(v, np.float32(-127)), np.float32(127))
        codes[i] = np.int8(np.float32(v + ROUND_MAGIC).view(np.int32) - ROUND_BITS)


@_sums
def int8_measure(x, scale, codes, sums):  # type: ignore[no-untyped-def]
    ww, ee, beyond = np.float32(0), np.float32(0), np.int32(0)
    step = scale * PER_127
    for i in range(x.shape[0]):
        w = as_float(x[i])
        e = w - bf16_rounded(np.float32(codes[i]) * scale * PER_127)
        ww += w * w
        ee += e * e
        # half a step; 2^-8 for bf16; 2^-24 for fp16 subnormals; and what a smaller scale clips
        limit = step * np.float32(0.501) + abs(w) * np.float32(0.004) + np.float32(6e-8)
        limit += max(abs(w) - scale, np.float32(0))
        beyond = np.int32(beyond + np.int32(abs(e) > limit))
    sums[0], sums[1], sums[2] = ww, ee, beyond
