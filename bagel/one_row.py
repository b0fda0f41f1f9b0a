"""Products with one row, those of a token of text, in the time that the CPU takes to read the weights; and its norms.

torch's own products with one row read a weight row by row, and the processor waits: it fetches few cache lines at a
time from one place, more from several. The compiled loop here (`bagel/one_row_kernel.py`) reads four places of a weight
at once; docs/speed.md has the figures. It takes weights in bf16 and fp32, sums in fp32 and rounds once, so results
differ from torch's by rounding. Everything else goes to torch: more rows, gradients, other devices and dtypes, weights
with gaps, and products so small that the call would cost more than it saves. A norm of one row is one call in place of
nine.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

SMALLEST = 1 << 18  # weights of a product from which the compiled loop is taken
SHARED = 1 << 21  # ... and from which threads share it
SMALLEST_ROW = 256  # values of a row from which the compiled norm is taken


class Linear(nn.Linear):
    """`nn.Linear` with the one-row product."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2 and x.shape[0] == 1 and fits(x, self.weight):
            return one_row(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `one_row` can multiply x [1, C] with a weight [R, C], and it pays."""
    return weight.numel() >= SMALLEST and _plain(x, weight)


def norm_fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `one_norm` can normalise x [1, ..., C] by a weight [C], and it pays."""
    return x.shape[0] == 1 and x.numel() >= SMALLEST_ROW and _plain(x, weight)


def _plain(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.bfloat16, torch.float32)
        and x.dtype == weight.dtype
        and type(x) is Tensor  # no fake tensor, whose shape alone is known
        and weight.is_contiguous()
        and x.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _kernels() is not None
    )


def one_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [1, C] times a weight [R, C], plus bias [R]: [1, R]; all contiguous on the CPU, all bf16 or all fp32.

    Summed in fp32 and rounded once. Does not depend on the number of threads. Torch's function modes see the call.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(one_row, (x,), x, weight, bias)  # type: ignore[no-any-return]
    kernels = _kernels()
    assert kernels is not None, "fits() comes before one_row()"
    work = kernels.rows_fp32 if x.dtype == torch.float32 else kernels.rows_bf16
    rows, columns = weight.shape
    y = x.new_empty(1, rows)
    whole = (weight.data_ptr(), x.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), rows, columns)
    quarter, threads = rows // 4, torch.get_num_threads() if weight.numel() >= SHARED else 1
    bounds = [quarter * part // threads for part in range(threads + 1)]
    others = [_pool().submit(work, *whole, *bounds[part : part + 2]) for part in range(1, threads)]
    work(*whole, *bounds[:2])
    for other in others:
        other.result()
    return y


def one_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [1, ..., C] by a weight [C], all bf16 or all fp32, rounded where `bagel.layers.RMSNorm` rounds."""
    kernels = _kernels()
    assert kernels is not None, "norm_fits() comes before one_norm()"
    y, columns = torch.empty_like(x), x.shape[-1]
    work = kernels.norm_fp32 if x.dtype == torch.float32 else kernels.norm_bf16
    work(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // columns, columns, eps)
    return y


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="one-row")


@functools.cache
def _kernels() -> ModuleType | None:
    """The compiled loops; None without numba."""
    try:
        from bagel import one_row_kernel
    except ImportError:
        return None
    return one_row_kernel
