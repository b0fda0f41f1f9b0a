"""raw: the tensor as it is. Lossless, and the codec of everything a recipe protects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from bagel_compress.codecs.base import Codec, Encoding, LaterChunk, Reader, Unit
from bagel_compress.errors import CodecError
from bagel_compress.io.tensor_spec import DTYPE_BYTES, PartSpec, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

CHUNK_ELEMENTS = 1 << 22  # 8 MB of bf16: large enough for full disk speed, small enough to stay in cache and memory


class Raw(Codec):
    """Stores the bytes of the source unchanged."""

    format: Literal["raw"] = "raw"
    lossless: ClassVar[bool] = True
    stored_as_is: ClassVar[bool] = True

    def check(self, unit: Unit) -> None:
        pass

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        return {s.name: PartSpec(s.dtype, s.shape) for s in unit.specs}

    def begin(self, unit: Unit, source: Reader) -> Encoding:
        return _RawEncoding(codec=self, parts=self.parts(unit), unit=unit, source=source)

    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for spec in unit.specs:
            if tuple(parts[spec.name].shape) != spec.shape:
                found = tuple(parts[spec.name].shape)
                raise CodecError(f"{spec.name}: stored shape {found}, expected {spec.shape}; the artifact is damaged.")
        return {s.name: parts[s.name] for s in unit.specs}

    def comfyui_values(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(parts)


@dataclass(slots=True)
class _RawEncoding(Encoding):
    unit: Unit = None  # type: ignore[assignment]
    source: Reader = None  # type: ignore[assignment]

    def chunks(self) -> Iterator[LaterChunk]:
        for spec in self.unit.specs:
            size = DTYPE_BYTES[spec.dtype]
            for start in range(0, spec.numel, CHUNK_ELEMENTS):
                stop = min(start + CHUNK_ELEMENTS, spec.numel)
                yield LaterChunk(spec.name, start * size, (stop - start) * size, partial(self._read, spec, start, stop))

    def _read(self, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
        import torch

        data: np.ndarray = self.source.read(spec, start, stop).view(torch.uint8).numpy()
        return data
