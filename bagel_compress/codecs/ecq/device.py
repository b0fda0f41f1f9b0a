"""A weight's stored parts on a device, and what decodes them there: numba on CPUs, CUDA or Triton on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.util import find_spec

import numpy as np
import torch

from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.ecq import decode
from bagel_compress.codecs.ecq.decode import Stored, check_parts
from bagel_compress.codecs.ecq.layout import RUN
from bagel_compress.codecs.ring_size import serves_understanding
from bagel_compress.errors import MissingExtraError

Runs = Callable[[int, int, torch.Tensor], None]  # first run, last run, bf16 [their weights] to fill


class StoredWeight:
    """Checked parts of one weight on their device; any stretch of whole runs can be decoded by itself."""

    def __init__(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> None:
        """Raises CodecError on parts that make no sense."""
        self._stored = check_parts(unit, parts)
        self.name, self.shape, self.nbytes = unit.name, self._stored.shape, self._stored.nbytes
        self.device = self._stored.stream.device

    def decode_runs(self, first: int, last: int, out: torch.Tensor) -> torch.Tensor:
        """Runs [first, last) into the front of a 1-D bf16 buffer on the weight's device; returns that front.

        On a GPU in stream order. Raises CodecError on a damaged stream on the CPU; a GPU does not look.
        """
        front = out[: min(last * RUN, self._stored.weights) - first * RUN]
        self._runs(first, last, front)
        return front

    def slices(self, most: int) -> list[Slice]:
        """The weight as slices of whole rows and whole runs, of about `most` weights each; one if it is smaller."""
        rows, columns = self.shape
        group = RUN // int(np.gcd(RUN, columns))  # rows that are whole runs
        step = max(1, most // (group * columns)) * group
        if rows * columns <= most:
            step = rows
        return [Slice(self, first, min(first + step, rows)) for first in range(0, rows, step)]

    @cached_property
    def _runs(self) -> Runs:
        return _on_cpu(self._stored) if self.device.type == "cpu" else _on_gpu(self._stored)


class Slice:
    """Whole rows of a weight, as the scratch ring takes units."""

    def __init__(self, weight: StoredWeight, first: int, last: int) -> None:
        rows, columns = weight.shape
        whole = (first, last) == (0, rows)
        self.name = weight.name if whole else f"{weight.name}[{first}:{last}]"
        self.numel, self.device = (last - first) * columns, weight.device
        self.nbytes = round(weight.nbytes * (last - first) / rows)
        self.for_understanding = serves_understanding(weight.name, [weight.name])
        self._weight, self._shape = weight, (last - first, columns)
        self._range = first * columns // RUN, -(-last * columns // RUN)

    def place(self, tensor: str) -> tuple[int, tuple[int, int]]:
        """First weight and shape: a slice is one matrix."""
        return 0, self._shape

    def decode_into(self, out: torch.Tensor) -> torch.Tensor:
        """Decodes into the front of a 1-D bf16 buffer; see `decode_runs`."""
        return self._weight.decode_runs(*self._range, out)


def decode_weight(unit: Unit, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(N, K) bf16 on the device of the parts."""
    weight = StoredWeight(unit, parts)
    [whole] = weight.slices(unit.numel)
    return whole.decode_into(torch.empty(unit.numel, dtype=torch.bfloat16, device=weight.device)).view(weight.shape)


def _on_cpu(stored: Stored) -> Runs:
    decoder = decode.EcqDecoder(stored)

    def runs(first: int, last: int, out: torch.Tensor) -> None:
        decoder.fill(first, last, out.view(torch.int16).numpy().view(np.uint16))

    return runs


def _on_gpu(stored: Stored) -> Runs:
    """Decoding by the CUDA kernel where it compiles, else by Triton."""
    from bagel_compress.codecs.ecq import cuda_kernel

    if cuda_kernel.available():
        return cuda_kernel.runs(stored)
    if find_spec("triton") is None:
        raise MissingExtraError(
            f"{stored.name}: decoding ecq on {stored.stream.device} needs Triton; install bagel-compress[gpu]."
        )
    from bagel_compress.codecs.ecq import triton_kernel

    return triton_kernel.runs(stored)
