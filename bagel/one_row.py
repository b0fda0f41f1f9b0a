"""A linear whose products with one row, those of a token of text, take the CPU the time to read the weights.

torch's own products with one row read a weight row by row, and the processor waits: it fetches few cache lines at a time
from one place, more from several. The compiled loop here (`bagel/one_row_kernel.py`) reads four places of a weight at once.
Measured in docs/speed.md. It takes weights in bf16 and fp32, sums in fp32 and rounds once, so results differ from torch's
by rounding. Everything else goes to `F.linear`: more rows, gradients, other devices and dtypes, weights with gaps, and
products so small that the call would cost more than it saves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

SMALLEST = 1 << 18  # weights of a product from which the compiled loop is taken
SHARED = 1 << 21  # ... and from which threads share it


class Linear(nn.Linear):
    """`nn.Linear` with the one-row product."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2 and x.shape[0] == 1 and fits(x, self.weight):
            return one_row(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `one_row` can multiply x [1, C] with a weight [R, C], and it pays."""
    return (
        weight.numel() >= SMALLEST
        and weight.device.type == "cpu"
        and weight.dtype in (torch.bfloat16, torch.float32)
        and x.dtype == weight.dtype
        and type(x) is Tensor  # no fake tensor, whose shape alone is known
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _kernel() is not None
    )


def one_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [1, C] times a contiguous weight [R, C] on the CPU, plus bias [R]: [1, R], all bf16 or all fp32.

    Summed in fp32 and rounded once. Does not depend on the number of threads. Torch's function modes see the call.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(one_row, (x,), x, weight, bias)  # type: ignore[no-any-return]
    work = _kernel()
    assert work is not None, "fits() comes before one_row()"
    y = x.new_empty(1, weight.shape[0])
    arrays = [_array(weight), _array(x)[0], _array(bias) if bias is not None else _array(y)[0, :0], _array(y)[0]]
    quarter, threads = weight.shape[0] // 4, torch.get_num_threads() if weight.numel() >= SHARED else 1
    bounds = [quarter * part // threads for part in range(threads + 1)]
    others = [_pool().submit(work, *arrays, *bounds[part : part + 2]) for part in range(1, threads)]
    work(*arrays, *bounds[:2])
    for other in others:
        other.result()
    return y


def _array(numbers: Tensor) -> Any:
    """The numbers as numpy has them: fp32, or the words of bf16."""
    return (numbers if numbers.dtype == torch.float32 else numbers.view(torch.uint16)).numpy()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="one-row")


@functools.cache
def _kernel() -> Callable[..., None] | None:
    """The compiled loop; None without numba."""
    try:
        from bagel.one_row_kernel import four_streams
    except ImportError:
        return None
    return four_streams  # type: ignore[no-any-return]
