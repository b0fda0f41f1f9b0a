"""The installed `dfloat11` package on a CPU: its compressor and its loader, with `cupy` replaced by a stub.

The stub's kernel is the emulator beside this file. Only what the package touches is stubbed: a module loaded from PTX
whose one function is called on data pointers, and a device context.
"""

from __future__ import annotations

import contextlib
import io
import sys
import types
from functools import cache
from types import ModuleType

import numpy as np
import torch
from dfloat11_emulator import launch


@cache
def package() -> tuple[ModuleType, ModuleType]:
    """The package's main module and its compressor's, imported once with the stub in place."""
    sys.modules.setdefault("cupy", _cupy())
    if "pkg_resources" not in sys.modules:
        try:
            import pkg_resources  # noqa: F401
        except ImportError:
            sys.modules["pkg_resources"] = types.SimpleNamespace(resource_filename=lambda *_: "decode.ptx")  # type: ignore[assignment]
    from dfloat11 import dfloat11, dfloat11_utils

    dfloat11.stderr = io.StringIO()  # it keeps the one of its import, which a test's capture closes
    return dfloat11, dfloat11_utils


def _cupy() -> ModuleType:
    stub = types.ModuleType("cupy")
    stub.RawModule = lambda path: types.SimpleNamespace(get_function=lambda name: _kernel)  # type: ignore[attr-defined]
    stub.cuda = types.SimpleNamespace(Device=lambda index: contextlib.nullcontext())  # type: ignore[attr-defined]
    return stub


def _kernel(grid: tuple[int], block: tuple[int], shared_mem: int, args: list[int]) -> None:
    launch(grid[0], block[0], shared_mem, args)


def compress(*weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The six tensors that the package's compressor makes of one unit. Raises what it raises."""
    _, utils = package()
    with quiet():
        _, counter = utils.get_codec(torch.cat([w.flatten() for w in weights]))
        codec, _, table = utils.get_32bit_codec(counter)
        luts = utils.get_luts(table)
        stream, rest, positions, gaps, splits = utils.encode_weights([w.flatten() for w in weights], codec, 8, 512)
    return {
        "luts": luts,
        "encoded_exponent": stream,
        "sign_mantissa": rest,
        "output_positions": positions.view(torch.uint8),
        "gaps": gaps,
        "split_positions": splits,
    }


@contextlib.contextmanager
def quiet():  # type: ignore[no-untyped-def]
    """The package prints tables and progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def emulate(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """bf16 [weights] as the package's hook would decode these six tensors (keys without the unit's name)."""
    positions = parts["output_positions"].numpy().view("<u4").astype(np.int64)
    out = torch.empty(parts["sign_mantissa"].numel(), dtype=torch.bfloat16)
    names = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")
    pointers = [parts[name].data_ptr() for name in names]
    size = parts["encoded_exponent"].numel()
    launch(
        -(-size // 4096),
        512,
        4 * 512 + 4 + 2 * int(np.diff(positions).max()),
        [*pointers, out.data_ptr(), parts["luts"].shape[0], size, out.numel()],
    )
    return out
