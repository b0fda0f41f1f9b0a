"""Numbers of formats that a codec shares with its kernels and its run-time module."""

from __future__ import annotations

NF4_BLOCK = 64  # weights per absmax, the bitsandbytes default
NF4_NESTED_BLOCK = 256  # absmax values per nested absmax (bitsandbytes' `quantize_4bit` passes blocksize=256)
FP8_MAX = 448.0  # largest e4m3fn number; the format has no infinity
FP4_MAX = 6.0  # largest e2m1 number
INT4_WIDE = (
    3.0e38  # blocks of int4 beyond it keep away from the ends of their codes, so that no decoded value overflows
)
