"""Coding one unit in two passes of bounded memory: `survey` counts exponents, `Df11Encoding` writes and verifies.

The first pass keeps one histogram per chunk of weights. With the book they give the exact first bit of every chunk, so
the second pass packs and verifies batches of chunks on all threads at once, and only joins the byte that two batches
share. What was packed is decoded again, gaps and block positions included, and compared with the source before it is
handed on.
Memory: a workspace of about 6 MB for each thread and one more, reused from unit to unit, one byte per 64 bits of code
and 1 KiB per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from bagel_compress.codecs.base import Chunk, Encoding, Reader, Unit
from bagel_compress.codecs.df11 import pack, unpack
from bagel_compress.codecs.df11.book import Book, make_book, stalls
from bagel_compress.codecs.df11.layout import (
    BLOCK_BITS,
    BYTES_PER_THREAD,
    GAP_BYTES,
    MAX_BLOCK_WEIGHTS,
    MAX_CODE_BITS,
    THREADS_PER_BLOCK,
    WINDOW_BITS,
    Sizes,
)
from bagel_compress.codecs.df11.pack import CHUNK
from bagel_compress.codecs.kernels.threads import ordered
from bagel_compress.errors import CodecError

BATCH = 1 << 22  # weights that one thread reads, packs, verifies and hands on at a time
_TAIL = 4 * WINDOW_BITS // 8  # bytes of the stream's end that are kept for the check on stalling
_WRONG = {
    unpack.BAD_CODE: "a code",
    unpack.BAD_GAP: "a gap",
    unpack.BAD_POSITION: "a block position",
    unpack.BAD_END: "the end of a chunk",
    unpack.DIFFERENT: "a weight",
}


@dataclass(slots=True)
class Workspace:
    """Both planes of one batch; kept, since the first touch of fresh memory costs more than packing."""

    rest: np.ndarray = field(default_factory=lambda: np.empty(BATCH, np.uint8))
    stream: np.ndarray = field(
        default_factory=lambda: np.empty(BATCH * MAX_CODE_BITS // 8 + max(pack.SLACK, unpack.READ_SLACK), np.uint8)
    )
    exponents: np.ndarray = field(default_factory=lambda: np.empty((2, CHUNK + unpack.SCRATCH_SLACK), np.uint8))


_idle: list[Workspace] = []


@dataclass(slots=True)
class Survey:
    """What the first pass found: int64 counts [256] and uint32 histograms [chunks, 256], in order of the weights."""

    counts: np.ndarray
    chunks: np.ndarray

    def bits(self, book: Book) -> np.ndarray:
        """First bit of every chunk and, last, the bits of the whole stream: int64 [chunks + 1]."""
        return np.concatenate([[0], np.cumsum(self.chunks @ book.lengths.astype(np.int64))])


@dataclass(frozen=True, slots=True)
class _Batch:
    """Consecutive weights of one tensor: the first one's index in the unit, and the first chunk's."""

    words: np.ndarray
    first: int
    chunk: int

    @property
    def chunks(self) -> int:
        return -(-self.words.size // CHUNK)


def survey(unit: Unit, source: Reader) -> Survey:
    """Counts the exponents of a unit, chunk by chunk."""
    chunks = np.zeros((sum(-(-spec.numel // CHUNK) for spec in unit.specs), 256), np.uint32)

    def count(batch: _Batch) -> None:
        pack.count_chunks(batch.words, np.empty((8, 256), np.uint32), chunks[batch.chunk :])

    for _ in ordered(count, _batches(unit, source)):
        pass
    return Survey(chunks.sum(axis=0, dtype=np.int64), chunks)


def choose_book(unit: Unit, source: Reader, found: Survey) -> Book:
    """The package's book; a fuller one if a block of it would hold more weights than the kernel's shared memory."""
    book = make_book(found.counts)
    if book.shortest == 1 and densest_block(unit, source, found, book) > MAX_BLOCK_WEIGHTS:
        return make_book(found.counts, at_least_two_bits=True)
    return book


def densest_block(unit: Unit, source: Reader, found: Survey, book: Book) -> int:
    """Most weights that start in one block of 4096 bytes. Reads the unit; only of interest where a code has one bit."""
    bits = found.bits(book)
    positions = np.zeros(int(bits[-1]) // BLOCK_BITS + 2, np.int64)
    lengths = book.lengths.astype(np.int64)
    for batch in _batches(unit, source):
        pack.mark_blocks(batch.words, batch.first, int(bits[batch.chunk]), lengths, positions)
    positions[-(-int(bits[-1]) // BLOCK_BITS) :] = unit.numel
    return int(np.diff(positions).max())


def _batches(unit: Unit, source: Reader) -> Iterator[_Batch]:
    first = chunk = 0
    for spec in unit.specs:
        for start in range(0, spec.numel, BATCH):
            batch = _Batch(words_of(source.read(spec, start, min(start + BATCH, spec.numel))), first, chunk)
            yield batch
            first, chunk = first + batch.words.size, chunk + batch.chunks


def words_of(values: torch.Tensor) -> np.ndarray:
    """bf16 [n] on the CPU as uint16: a view, unless it lies at an odd address."""
    words: np.ndarray = values.view(torch.int16).numpy().view(np.uint16)
    return words if words.flags.aligned else words.copy()


@dataclass(slots=True)
class Df11Encoding(Encoding):
    """The second pass. `bits` as `Survey.bits` gives them for `book`."""

    unit: Unit = None  # type: ignore[assignment]
    source: Reader = None  # type: ignore[assignment]
    book: Book = None  # type: ignore[assignment]
    bits: np.ndarray = None  # type: ignore[assignment]
    sizes: Sizes = None  # type: ignore[assignment]

    def chunks(self) -> Iterator[Chunk]:
        name = self.unit.name
        packer = _Packer(self)
        for batch, space, size in ordered(packer.code, _batches(self.unit, self.source)):
            yield Chunk(f"{name}.sign_mantissa", batch.first, space.rest[: batch.words.size])
            yield Chunk(f"{name}.encoded_exponent", int(self.bits[batch.chunk]) >> 3, packer.joined(space.stream, size))
            _idle.append(space)
        ends = np.cumsum([spec.numel for spec in self.unit.specs])[:-1].astype("<i8")
        yield Chunk(f"{name}.gaps", 0, packer.packed_gaps())
        yield Chunk(f"{name}.output_positions", 0, packer.positions.astype("<u4").view(np.uint8))
        yield Chunk(f"{name}.split_positions", 0, ends.view(np.uint8))
        yield Chunk(f"{name}.luts", 0, packer.luts().reshape(-1))


class _Packer:
    """The second pass: `code` for batches in any order and thread, `joined` for its results in order."""

    def __init__(self, encoding: Df11Encoding) -> None:
        self.positions = np.zeros(encoding.sizes.blocks + 1, np.int64)
        self._encoding = encoding
        self._gaps = np.zeros(THREADS_PER_BLOCK * encoding.sizes.blocks + 1, np.uint8)
        self._begun = 0  # the byte that the last batch left unfinished
        self._tail = b""  # the end of the stream
        values, lengths = encoding.book.values, encoding.book.lengths
        self._book = (values.astype(np.uint64), lengths, *pack.pair_tables(values, lengths))
        self._lookup = unpack.lookup_table(encoding.book.luts)

    def code(self, batch: _Batch) -> tuple[_Batch, Workspace, int]:
        """Packs and verifies a batch, in a workspace that the caller gives back; and the bytes that it completes."""
        try:
            space = _idle.pop()
        except IndexError:
            space = Workspace()
        unit = self._encoding.unit
        bits = self._encoding.bits[batch.chunk : batch.chunk + batch.chunks + 1]
        planes = (space.rest, space.stream)
        if not pack.pack_chunks(batch.words, batch.first, bits, *self._book, *planes, self._gaps, self.positions):
            raise CodecError(f"{unit.name}: the source changed while it was read, near weight {batch.first}; start again.")
        size = int((bits[-1] >> 3) - (bits[0] >> 3))
        if batch.first + batch.words.size == unit.numel:
            size = self._finish(int(bits[-1]), size, space.stream)
        self._verify(batch, bits, space)
        return batch, space, size

    def joined(self, stream: np.ndarray, size: int) -> np.ndarray:
        """The bytes that the next batch in order completes: a view of its `stream`."""
        stream[0] |= self._begun
        self._begun = int(stream[size])
        self._tail = (self._tail + stream[max(0, size - _TAIL) : size].tobytes())[-_TAIL:]
        return stream[:size]

    def packed_gaps(self) -> np.ndarray:
        packed = np.empty(GAP_BYTES * self._encoding.sizes.blocks, np.uint8)
        pack.pack_gaps(self._gaps[:-1], packed)
        return packed

    def luts(self) -> np.ndarray:
        """The book's tables, made safe if the official kernel would never return from the end of this stream."""
        used = self._encoding.sizes.stream_bytes
        begin = used - len(self._tail)
        data = self._tail + bytes(_TAIL)
        for window in range(max(0, begin // BYTES_PER_THREAD + 1 if begin else 0), len(self._gaps)):
            at = window * BYTES_PER_THREAD - begin
            if at >= len(self._tail) + BYTES_PER_THREAD:
                break
            if stalls(self._encoding.book.luts, int.from_bytes(data[at : at + 12], "big"), int(self._gaps[window])):
                return self._encoding.book.without_pointers().luts
        return self._encoding.book.luts

    def _finish(self, bits: int, size: int, stream: np.ndarray) -> int:
        """Pads the last byte, sets the last block position, and clears a gap that would point at no padding."""
        self.positions[-1] = self._encoding.unit.numel
        hole = -bits % 8
        if hole:
            stream[size] |= self._encoding.book.padding(hole)
            return size + 1
        if bits % WINDOW_BITS and self._gaps[bits // WINDOW_BITS] == bits % WINDOW_BITS:
            self._gaps[bits // WINDOW_BITS] = 0
        return size

    def _verify(self, batch: _Batch, bits: np.ndarray, space: Workspace) -> None:
        unit, book = self._encoding.unit, self._encoding.book
        stream = space.stream.ctypes.data - (int(bits[0]) >> 3)
        args = (batch.words, CHUNK, stream, batch.first, unit.numel, bits, space.rest)
        index = (self._lookup, book.luts, self._gaps, self.positions)
        status = unpack.verify_chunks(*args, *index, space.exponents)
        if status != unpack.OK:
            raise CodecError(
                f"{unit.name}: {_WRONG[status]} did not come back as it was coded, near weight {batch.first}; "
                "the memory of this machine or the source is changing under the encoder."
            )
