"""ecq: bf16 matrices on a uniform grid, entropy-coded: any rate from 1.5 to 8.5 bits per weight.

A weight is bf16(code * step), one fp32 step for the whole matrix, or, with `columns`, that times a bf16 factor of its
input column (WaterSIC, arXiv 2603.04956: from the moments of the layer's inputs, so with rounding gptq only). Codes are
integers without ends, so no weight is ever clipped: what is beyond 8 bits is stored as it is. Codes of trained weights
are few and uneven; coded at their entropy they take fewer bits than any fixed width of the same error (at 4.13 bits the
error of normal weights is 0.069 of their norm, NF4's is 0.092). `bits` is what is stored, run lengths and code book
included: an upper bound that the step is searched to meet. Layout: layout.py.

What it does not do: other dtypes, vectors and convolutions; runtimes other than this one read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from bagel_compress.codecs.base import Encoding, Reader, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec
from bagel_compress.codecs.ecq.layout import MAX_BITS, MIN_BITS, SLICE, Sizes, bound
from bagel_compress.codecs.grid import Grid
from bagel_compress.codecs.matrix import MatrixCodec
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    import torch

# Relative error of normal weights on a uniform grid coded at its entropy, at rate R: sqrt(pi e / 6) 2^-R (Gish and
# Pierce, IEEE Trans. Inf. Theory 14, 1968).
HIGH_RATE = math.sqrt(math.pi * math.e / 6)


class Ecq(CalibratedCodec, MatrixCodec):
    """Entropy-coded quantisation at `bits` per weight."""

    format: Literal["ecq"] = "ecq"
    bits: float = Field(4.13, ge=MIN_BITS, le=MAX_BITS, description="stored bits per weight, everything included")
    columns: bool = Field(False, description="a step for every input column, from the moments of the layer's inputs")
    exact: ClassVar[bool] = False
    movable: ClassVar[bool] = False

    @property
    def normal_error(self) -> float:
        return HIGH_RATE * 2.0**-self.bits

    @model_validator(mode="after")
    def _columns_need_moments(self) -> Ecq:
        if self.columns and not self.calibrated:
            raise ValueError("columns is true with rounding nearest; steps of columns need rounding gptq")
        return self

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        """An upper bound: the rate, whatever the data."""
        return self._bound(unit).parts(unit.specs[0].name)

    def begin(self, unit: Unit, source: Reader) -> Encoding:
        """Counts the words of the weight and measures its runs. Raises CodecError on NaN, Inf and 2^126 and more."""
        from bagel_compress.codecs.ecq.encode import begin

        return begin(self, unit.specs[0], source, self._bound(unit))

    def grid(self, spec: TensorSpec) -> Grid:
        from bagel_compress.codecs.ecq.calibrated import EcqGrid

        return EcqGrid(spec, self._bound(Unit(spec.name, (spec,))))

    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """bf16(code * step), the product in fp32. Checks every run on the way."""
        from bagel_compress.codecs.ecq.device import decode_weight

        return {unit.specs[0].name: decode_weight(unit, parts)}

    def linears(
        self, unit: Unit, parts: Mapping[str, torch.Tensor], biases: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.nn.Module]:
        """A module that decodes its weight when it is called (see `runtime.py`)."""
        from bagel_compress.codecs.ecq.runtime import linear

        return {unit.specs[0].name: linear(unit, parts, biases.get(unit.specs[0].name))}

    @classmethod
    def ring_units(cls, units: Iterable[Unit]) -> list[tuple[str, int]]:
        """Weights, or slices of large ones."""
        return [(unit.name, min(unit.numel, SLICE)) for unit in units]

    def fake_linears(
        self,
        unit: Unit,
        parts: Mapping[str, torch.Tensor],
        biases: Mapping[str, torch.Tensor],
        scratch: torch.Tensor | None,
    ) -> dict[str, torch.nn.Module]:
        """Linears that multiply with a stretch of the ring: fake bits cannot be decoded."""
        from bagel_compress.codecs.ring_fake import fake_linear

        assert scratch is not None
        return {spec.name: fake_linear(spec, biases.get(spec.name), scratch, SLICE) for spec in unit.specs}

    def embedding(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """A table that decodes the rows that are looked up."""
        from bagel_compress.codecs.ecq.runtime import EcqEmbedding

        return EcqEmbedding(unit, parts)

    def fake_embedding(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """A table that holds the parts and gives rows without values."""
        from bagel_compress.codecs.ring_fake import FakeTable

        return FakeTable(unit.specs[0], parts)

    def _bound(self, unit: Unit) -> Sizes:
        (spec,) = unit.specs
        return bound(spec.numel, self.bits, spec.shape[1] if self.columns else 0)
