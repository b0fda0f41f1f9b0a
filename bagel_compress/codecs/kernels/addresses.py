"""Loads and stores at any address and bit counts for the numba kernels that code bit streams.

A bit stream is read and written at any byte, which numpy arrays cannot express; these compile to one instruction each.
Addresses are plain integers: the kernels that use them keep every access inside the buffers their callers sized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_BYTE, _PAIR, _HALF, _WORD = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_ZERO_IS_DEFINED = ir.Constant(ir.IntType(1), 0)
_Generator = tuple[Any, Callable[..., Any]]


@njit(nogil=True, inline="always")
def address_of(array):  # type: ignore[no-untyped-def]
    """Of an array's first element. The caller keeps the array alive while the address is used.

    numba frees an array that a kernel made after its last use as an array; addresses are no use.
    """
    return np.int64(array.ctypes.data)


@intrinsic
def load8(typing: Any, address: Any) -> _Generator:
    """The byte at `address`, as uint64."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.load(builder.inttoptr(args[0], _BYTE.as_pointer())), _WORD)

    return types.uint64(types.uintp), emit


@intrinsic
def load16(typing: Any, address: Any) -> _Generator:
    """The little-endian 16-bit number at `address`, aligned or not, as uint64."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], _PAIR.as_pointer()))
        value.align = 1
        return builder.zext(value, _WORD)

    return types.uint64(types.uintp), emit


@intrinsic
def load32(typing: Any, address: Any) -> _Generator:
    """The little-endian 32-bit number at `address`, aligned or not, as uint64."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], _HALF.as_pointer()))
        value.align = 1
        return builder.zext(value, _WORD)

    return types.uint64(types.uintp), emit


@intrinsic
def load64(typing: Any, address: Any) -> _Generator:
    """The little-endian uint64 at `address`, aligned or not."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], _WORD.as_pointer()))
        value.align = 1
        return value

    return types.uint64(types.uintp), emit


@intrinsic
def store8(typing: Any, address: Any, value: Any) -> _Generator:
    """Stores the low byte of `value` at `address`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(builder.trunc(args[1], _BYTE), builder.inttoptr(args[0], _BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.uintp, types.uint64), emit


@intrinsic
def store16(typing: Any, address: Any, value: Any) -> _Generator:
    """Stores the low 16 bits of `value` at `address` in little-endian order, aligned or not."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(builder.trunc(args[1], _PAIR), builder.inttoptr(args[0], _PAIR.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.uintp, types.uint64), emit


@intrinsic
def store64(typing: Any, address: Any, value: Any) -> _Generator:
    """Stores `value` at `address` in little-endian order, aligned or not."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], _WORD.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.uintp, types.uint64), emit


@intrinsic
def byteswap(typing: Any, value: Any) -> _Generator:
    """`value` with its eight bytes in reverse order."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bswap(args[0])

    return types.uint64(types.uint64), emit


@intrinsic
def trailing_zeros(typing: Any, value: Any) -> _Generator:
    """Zero bits below the lowest one bit; 64 for zero."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], _ZERO_IS_DEFINED)

    return types.uint64(types.uint64), emit


@intrinsic
def ones(typing: Any, value: Any) -> _Generator:
    """Number of one bits."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), emit
