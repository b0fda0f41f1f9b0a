"""int4's searched scales: of some factors on absmax the one of least squared error, taken back to full length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bagel_compress.codecs.constants import INT4_WIDE

if TYPE_CHECKING:
    import torch

LEVELS = 7.5  # half of the 15 steps between -8 and 7


def quantised(weights: torch.Tensor, shrink: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (B, G) fp32 -> codes (B, G) and bf16 scales (B,) of least squared error among the factors."""
    import torch

    absmax = weights.abs().amax(1)
    best_codes, best_scale = _rounded(weights, absmax)
    best = (weights - best_codes * best_scale.float()[:, None]).square().sum(1)
    for factor in shrink[1:]:
        codes, scale = _rounded(weights, absmax * factor)
        error = (weights - codes * scale.float()[:, None]).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_codes = torch.where(better[:, None], codes, best_codes)
        best_scale = torch.where(better, scale, best_scale)
    return best_codes, _unshrunk(weights, best_codes, best_scale, absmax)


def _unshrunk(weights: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Scales under which a block keeps its length along its weights: sum(w * decoded) = sum(w * w).

    Least squares shrinks every block by its relative squared error (about 1 %), which would be a gain below 1 in every
    layer; taking that back costs a hundredth of the error.
    """
    import torch

    unit = weights / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # squares of weights may overflow
    along = (unit * codes).sum(1) * scale.float()
    gain = torch.where((along > 0) & (absmax <= INT4_WIDE), unit.square().sum(1) * absmax / along, 1.0)
    return (scale.float() * gain).bfloat16()


def _rounded(weights: torch.Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    scale = (top / LEVELS).bfloat16()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    low = torch.where(top > INT4_WIDE, -7.0, -8.0)[:, None]
    return torch.maximum((weights / scale.float()[:, None]).round().clamp(max=7.0), low), scale


def error(weights: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> float:
    """Squared error of what `decode` will give."""
    decoded = (codes * scale.float()[:, None]).bfloat16()
    return float((weights - decoded.float()).double().square().sum())
