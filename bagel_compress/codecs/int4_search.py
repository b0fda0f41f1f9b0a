"""int4's searched scales: of some factors on absmax the one of least squared error, taken back to full length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagel_compress.codecs.base import Chunk, Encoding, Reader
from bagel_compress.codecs.constants import INT4_WIDE
from bagel_compress.codecs.matrix import as_floats, not_finite, read_words
from bagel_compress.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch

LEVELS = 7.5  # half of the 15 steps between -8 and 7
CHUNK_ELEMENTS = 1 << 20  # coded or decoded at a time; the search holds some fp32 copies of it
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # factors on absmax that the search tries


@dataclass(slots=True, kw_only=True)
class SearchedEncoding(Encoding):
    """Scales by search, for blocks of `group` weights."""

    spec: TensorSpec
    source: Reader
    group: int

    def chunks(self) -> Iterator[Chunk]:
        import numpy as np
        import torch

        spec = self.spec
        rows, columns = spec.shape
        step = max(1, CHUNK_ELEMENTS // columns)
        for row in range(0, rows, step):
            stop = min(row + step, rows)
            words = read_words(self.source, spec, row * columns, stop * columns)
            weights = torch.from_numpy(as_floats(words)).reshape(-1, self.group)
            if not bool(torch.isfinite(weights).all()):
                raise not_finite(spec, self.codec)
            codes, scale = quantised(weights)
            self.quality.add(float(weights.double().square().sum()), error(weights, codes, scale))
            nibbles = (codes.flatten() + 8).to(torch.uint8)
            packed = nibbles[0::2] | (nibbles[1::2] << 4)
            yield Chunk(f"{spec.name}_packed", row * columns // 2, packed.numpy())
            yield Chunk(f"{spec.name}_scale", row * columns // self.group * 2, scale.view(torch.uint8).numpy())
        yield Chunk(f"{spec.name}_shape", 0, np.array(spec.shape, np.int64).view(np.uint8))


def quantised(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (B, G) fp32 -> codes (B, G) and bf16 scales (B,) of least squared error among the factors."""
    import torch

    absmax = weights.abs().amax(1)
    best_codes, best_scale = _rounded(weights, absmax)
    best = (weights - best_codes * best_scale.float()[:, None]).square().sum(1)
    for factor in SHRINK[1:]:
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
