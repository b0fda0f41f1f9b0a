"""The stored parts of a weight back to bf16, on the CPU. Every inconsistency is a CodecError that names the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.ecq.book import Book, read_book
from bagel_compress.codecs.ecq.layout import COLUMN_STEPS, HEADER_BYTES, RUN
from bagel_compress.codecs.kernels.threads import split
from bagel_compress.errors import CodecError
from bagel_compress.io.tensor_spec import TensorSpec

GRAIN = 64  # runs that are worth a thread: 131,072 weights
DTYPES = {"stream": torch.uint8, "run_bytes": torch.uint16, "book": torch.uint16, "step": torch.float32}


@dataclass(frozen=True, slots=True)
class Stored:
    """The parts of one weight, checked for everything but the stream itself; the small ones as numpy."""

    name: str
    shape: tuple[int, int]
    stream: torch.Tensor  # uint8, on its device
    offsets: np.ndarray  # int64 [runs + 1]: first byte of every run, and the end of the stream
    book: Book
    step: np.float32
    column_steps: np.ndarray  # fp32 [columns], or empty
    nbytes: int  # of all parts

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def runs(self) -> int:
        return len(self.offsets) - 1


class EcqDecoder:
    """Decodes any runs of a weight on the CPU."""

    def __init__(self, stored: Stored) -> None:
        from bagel_compress.codecs.ecq import unpack

        self._stored, self._table = stored, unpack.decoder(stored.book.frequencies)
        # A damaged run may read on behind its end: those within READ_SLACK of the stream's are decoded from a copy.
        last = len(stored.stream) - unpack.READ_SLACK
        self._inner = max(0, int(np.searchsorted(stored.offsets, last, side="right")) - 1) if last > 0 else 0
        self._from = int(stored.offsets[self._inner])
        end = stored.stream.numpy()[self._from :]
        self._end = np.concatenate([end, np.zeros(unpack.READ_SLACK, np.uint8)])

    def fill(self, first: int, last: int, words: np.ndarray) -> None:
        """Runs [first, last) into uint16 `words`, on all threads. Raises CodecError on a damaged stream."""

        def part(a: int, b: int) -> None:
            self.runs(first + a, first + b, words[a * RUN : b * RUN])

        split(part, last - first, GRAIN)

    def runs(self, first: int, last: int, words: np.ndarray) -> None:
        """Runs [first, last) into uint16 `words`, on this thread. Raises CodecError on a damaged stream."""
        border = min(max(first, self._inner), last)
        self._decode(first, border, self._stored.stream.data_ptr(), words)
        padded = self._end.ctypes.data - self._from
        self._decode(border, last, padded, words[(border - first) * RUN :])

    def _decode(self, first: int, last: int, stream: int, words: np.ndarray) -> None:
        from bagel_compress.codecs.ecq import unpack

        if first >= last:
            return
        stored = self._stored
        whole = unpack.unpack_runs(
            (first, last), stream, stored.offsets, stored.weights, self._table, stored.book.low_bits,
            stored.book.escaping, stored.step, stored.column_steps, words,
        )  # fmt: skip
        if not whole:
            raise damaged(stored.name, "the bits of a run do not end where the run does, in the coder's first state")


def check_parts(unit: Unit, parts: Mapping[str, torch.Tensor]) -> Stored:
    """Names, dtypes and sizes of the parts, lengths of the runs, book and steps. Raises CodecError."""
    (spec,) = unit.specs
    tensors = {suffix: _part(spec, suffix, dtype, parts) for suffix, dtype in DTYPES.items()}
    runs = -(-spec.numel // RUN)
    run_bytes = _numpy(tensors["run_bytes"]).astype(np.int64)
    book = read_book(_numpy(tensors["book"]))
    if len(run_bytes) != runs:
        raise damaged(spec.name, f"run_bytes has {len(run_bytes)} entries, expected {runs}")
    if isinstance(book, str):
        raise damaged(spec.name, book)
    offsets = np.concatenate([[0], np.cumsum(run_bytes)])
    stream = tensors["stream"]
    least = HEADER_BYTES + book.low_bits * ((np.minimum(RUN, spec.numel - RUN * np.arange(runs)) + 7) >> 3)
    if offsets[-1] != len(stream) or (run_bytes < least).any():
        raise damaged(spec.name, f"run_bytes add up to {offsets[-1]}, the stream has {len(stream)}")
    step = _numpy(tensors["step"])
    if step.size != 1 or not (np.isfinite(step) & (step > 0)).all():
        raise damaged(spec.name, f"step is {step}, expected one positive number")
    columns = _column_steps(spec, parts, step[0])
    nbytes = sum(part.nbytes for part in tensors.values()) + 2 * columns.size
    return Stored(spec.name, (spec.shape[0], spec.shape[1]), stream, offsets, book, step[0], columns, nbytes)


def _column_steps(spec: TensorSpec, parts: Mapping[str, torch.Tensor], step: np.float32) -> np.ndarray:
    """fp32 step of each column: the step times the column's bf16 factor. Empty without such a part."""
    if f"{spec.name}.{COLUMN_STEPS}" not in parts:
        return np.empty(0, np.float32)
    factors = _part(spec, COLUMN_STEPS, torch.bfloat16, parts)
    if len(factors) != spec.shape[1]:
        raise damaged(spec.name, f"{COLUMN_STEPS} has {len(factors)} entries, expected {spec.shape[1]}")
    with np.errstate(over="ignore"):
        steps: np.ndarray = factors.float().cpu().numpy() * step
    if not (np.isfinite(steps) & (steps > 0)).all():
        raise damaged(spec.name, f"{COLUMN_STEPS} are not all positive numbers")
    return steps


def _part(spec: TensorSpec, suffix: str, dtype: torch.dtype, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    name = f"{spec.name}.{suffix}"
    if name not in parts:
        raise damaged(spec.name, f"{suffix} is missing")
    tensor = parts[name]
    if tensor.dtype != dtype or tensor.dim() != 1:
        raise damaged(spec.name, f"{suffix} is {tensor.dtype} of {tensor.dim()} dimensions, expected {dtype} of one")
    return tensor.detach().contiguous()


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array


def damaged(name: str, what: str) -> CodecError:
    """The error for parts that make no sense."""
    return CodecError(f"{name}: {what}; the stored weight is damaged or belongs to another: build or fetch it again.")
