"""Gradients through a linear whose weight is stored in codes and stays as it is.

The gradient of x is the gradient of y times the decoded weight, whatever kernel multiplied in the forward pass. The
weight is decoded a second time for it, so that no decoded weight is kept between the passes, and scratch memory that
another linear has overwritten meanwhile does no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Product = Callable[[torch.Tensor], torch.Tensor]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: Product, weight: Callable[[], torch.Tensor]) -> torch.Tensor:
        ctx.weight = weight
        return product(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        return grad @ ctx.weight().to(grad.dtype), None, None


def multiplied(x: torch.Tensor, product: Product, weight: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`product(x)`, x (..., in) -> (..., out), with a gradient where x wants one; `weight` decodes (out, in)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, product, weight)  # type: ignore[no-any-return, no-untyped-call]
    return product(x)
