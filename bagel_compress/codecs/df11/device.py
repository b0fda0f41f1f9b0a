"""A unit's stored parts on a device, and the kernel that decodes them there: numba on CPUs, CUDA or Triton on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.df11.decode import CheckedParts, check_parts, decode_into
from bagel_compress.codecs.ring_size import serves_understanding
from bagel_compress.errors import MissingExtraError


class Df11Unit:
    """Checked parts of a unit on their device, ready to decode."""

    def __init__(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> None:
        """Raises CodecError on parts that make no sense."""
        stored = check_parts(unit, parts)
        self.name, self.numel, self.device = unit.name, unit.numel, stored.stream.device
        self.for_understanding = serves_understanding(unit.name, (spec.name for spec in unit.specs))
        self._places: dict[str, tuple[int, tuple[int, int]]] = {}
        start = 0
        for spec in unit.specs:
            self._places[spec.name] = (start, (spec.shape[0], spec.shape[1]))
            start += spec.numel
        sizes = (stored.luts, stored.stream, stored.rest, stored.gaps)
        self.nbytes = 4 * len(stored.positions) + sum(part.nbytes for part in sizes)
        self._decode = partial(decode_into, stored) if self.device.type == "cpu" else _gpu_decoder(stored)

    def place(self, tensor: str) -> tuple[int, tuple[int, int]]:
        """First weight and shape of one of the unit's tensors."""
        return self._places[tensor]

    def decode_into(self, out: torch.Tensor) -> torch.Tensor:
        """Decodes into the front of a 1-D bf16 buffer on the unit's device; returns that front.

        On a GPU in stream order. Raises CodecError on a damaged stream on the CPU; a GPU does not look.
        """
        return self._decode(out)


def decode_unit(unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a unit by name: views of one new buffer on the device of the parts."""
    stored = Df11Unit(unit, parts)
    flat = stored.decode_into(torch.empty(unit.numel, dtype=torch.bfloat16, device=stored.device))
    tensors = {}
    for spec in unit.specs:
        start, shape = stored.place(spec.name)
        tensors[spec.name] = flat[start : start + spec.numel].view(shape)
    return tensors


def _gpu_decoder(stored: CheckedParts) -> Callable[[torch.Tensor], torch.Tensor]:
    """Decoding by the CUDA kernel where it compiles, else by Triton."""
    from bagel_compress.codecs.df11 import cuda_kernel, unpack

    with_cuda, device = cuda_kernel.available(), stored.stream.device
    if not with_cuda and find_spec("triton") is None:
        raise MissingExtraError(
            f"{stored.name}: decoding DF11 on {device} needs Triton; install bagel-compress[gpu]."
        )  # fmt: skip
    table = unpack.lookup_table(stored.luts, cuda_kernel.LOOKUP_BITS if with_cuda else unpack.LOOKUP_BITS)
    positions = stored.positions.astype("<u4").view(np.int32) if with_cuda else stored.positions
    densest = int(np.diff(stored.positions).max())
    luts, stream, rest, gaps = (
        cuda_kernel.aligned(part)
        for part in (torch.from_numpy(stored.luts).to(device), stored.stream, stored.rest, stored.gaps)
    )
    args = (
        torch.from_numpy(table.view(np.int64)).to(device),
        luts,
        stream,
        rest,
        torch.from_numpy(positions).to(device),
        gaps,
    )

    def decode(out: torch.Tensor) -> torch.Tensor:
        flat = out[: rest.numel()]
        if with_cuda:
            cuda_kernel.decode(*args, flat, densest)
        else:
            from bagel_compress.codecs.df11 import triton_kernel

            triton_kernel.decode(*args, flat)
        return flat

    return decode
