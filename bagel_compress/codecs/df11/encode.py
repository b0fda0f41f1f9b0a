"""Coding one unit in two passes of bounded memory: `survey` counts exponents, `Df11Encoding` writes and verifies.

The first pass keeps one histogram per batch of weights. With the book they give the exact first bit of every batch, so
in both passes each thread works on a batch of its own and never waits for the others; only the byte that two batches
share is joined. What was packed is decoded again and compared with the source before it is handed on, and that decoder
finds the gaps and block positions.
Memory: two workspaces of about 4 MB for each thread, reused from unit to unit, one byte per 64 bits of code and 2 KiB
per batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from bagel_compress.codecs.base import Chunk, Encoding, Reader, Unit
from bagel_compress.codecs.df11 import pack, unpack
from bagel_compress.codecs.df11.book import HuffmanBook, make_book, stalls
from bagel_compress.codecs.df11.layout import (
    BLOCK_BITS,
    BYTES_PER_THREAD,
    GAP_BYTES,
    MAX_BLOCK_WEIGHTS,
    MAX_CODE_BITS,
    THREADS_PER_BLOCK,
    WINDOW_BITS,
    UnitSizes,
)
from bagel_compress.codecs.df11.pack import CHUNK
from bagel_compress.codecs.kernels.threads import Workspaces, ordered
from bagel_compress.errors import CodecError
from bagel_compress.io.bf16 import as_words

BATCH = 1 << 21  # weights that one thread reads, packs, verifies and hands on at a time
_TAIL = 4 * WINDOW_BITS // 8  # bytes of the stream's end that are kept for the check on stalling


@dataclass(slots=True)
class EncodingBuffers:
    """Planes and scratch of one batch."""

    rest: np.ndarray = field(default_factory=lambda: np.empty(BATCH, np.uint8))
    stream: np.ndarray = field(
        default_factory=lambda: np.empty(BATCH * MAX_CODE_BITS // 8 + max(pack.SLACK, unpack.READ_SLACK), np.uint8)
    )
    exponents: np.ndarray = field(default_factory=lambda: np.empty((2, CHUNK + unpack.SCRATCH_SLACK), np.uint8))
    pairs: np.ndarray = field(default_factory=lambda: np.empty((2, 1 << 16), np.uint32))


_buffers = Workspaces(EncodingBuffers)


@dataclass(slots=True)
class Survey:
    """What the first pass found: int64 counts [256] and histograms [batches, 256], in order of the weights."""

    counts: np.ndarray
    batches: np.ndarray

    def bits(self, book: HuffmanBook) -> np.ndarray:
        """First bit of every batch and, last, the bits of the whole stream: int64 [batches + 1]."""
        return np.concatenate([[0], np.cumsum(self.batches @ book.lengths.astype(np.int64))])


@dataclass(frozen=True, slots=True)
class _Batch:
    """Consecutive weights of one tensor: the batch's number and the index of its first weight, in the unit."""

    words: np.ndarray
    number: int
    first: int


def survey(unit: Unit, source: Reader) -> Survey:
    """Counts the exponents of a unit, batch by batch."""
    found = list(ordered(_histogram, _batches(unit, source)))
    batches = np.array(found, np.int64).reshape(-1, 256)
    return Survey(batches.sum(axis=0), batches)


def _histogram(batch: _Batch) -> np.ndarray:
    space, counts = _buffers.take(), np.empty(256, np.int64)
    pack.count(batch.words, space.pairs, counts)
    _buffers.give(space)
    return counts


def choose_book(unit: Unit, source: Reader, found: Survey) -> HuffmanBook:
    """The package's book; a fuller one if a block of it would hold more weights than the kernel's shared memory."""
    book = make_book(found.counts)
    if book.shortest == 1 and densest_block(unit, source, found, book) > MAX_BLOCK_WEIGHTS:
        return make_book(found.counts, at_least_two_bits=True)
    return book


def densest_block(unit: Unit, source: Reader, found: Survey, book: HuffmanBook) -> int:
    """Most weights that start in one block of 4096 bytes. Reads the unit; only of interest where a code has one bit."""
    bits = found.bits(book)
    positions = np.zeros(int(bits[-1]) // BLOCK_BITS + 2, np.int64)
    lengths = book.lengths.astype(np.int64)
    for batch in _batches(unit, source):
        pack.mark_blocks(batch.words, batch.first, int(bits[batch.number]), lengths, positions)
    positions[-(-int(bits[-1]) // BLOCK_BITS) :] = unit.numel
    return int(np.diff(positions).max())


def _batches(unit: Unit, source: Reader) -> Iterator[_Batch]:
    number = first = 0
    for spec in unit.specs:
        for start in range(0, spec.numel, BATCH):
            words = as_words(source.read(spec, start, min(start + BATCH, spec.numel)))
            yield _Batch(words if words.flags.aligned else words.copy(), number, first)
            number, first = number + 1, first + words.size


@dataclass(slots=True)
class Df11Encoding(Encoding):
    """The second pass. `bits` as `Survey.bits` gives them for `book`."""

    unit: Unit = None  # type: ignore[assignment]
    source: Reader = None  # type: ignore[assignment]
    book: HuffmanBook = None  # type: ignore[assignment]
    bits: np.ndarray = None  # type: ignore[assignment]
    sizes: UnitSizes = None  # type: ignore[assignment]

    def chunks(self) -> Iterator[Chunk]:
        name = self.unit.name
        packer = _StreamPacker(self)
        for batch, space, size in ordered(packer.code, _batches(self.unit, self.source)):
            start = int(self.bits[batch.number]) >> 3
            yield Chunk(f"{name}.sign_mantissa", batch.first, space.rest[: batch.words.size], direct=True)
            yield Chunk(f"{name}.encoded_exponent", start, packer.joined(space.stream, size), direct=True)
            _buffers.give(space)
        ends = np.cumsum([spec.numel for spec in self.unit.specs])[:-1].astype("<i8")
        yield Chunk(f"{name}.gaps", 0, packer.packed_gaps())
        yield Chunk(f"{name}.output_positions", 0, packer.positions.astype("<u4").view(np.uint8))
        yield Chunk(f"{name}.split_positions", 0, ends.view(np.uint8))
        yield Chunk(f"{name}.luts", 0, packer.luts().reshape(-1))


class _StreamPacker:
    """The second pass: `code` for batches in any order and thread, `joined` for its results in order."""

    def __init__(self, encoding: Df11Encoding) -> None:
        self.positions = np.zeros(encoding.sizes.blocks + 1, np.int64)
        self.positions[-1] = encoding.unit.numel
        self._encoding = encoding
        self._gaps = np.zeros(THREADS_PER_BLOCK * encoding.sizes.blocks + 1, np.uint8)
        self._begun = 0  # the byte that the last batch left unfinished
        self._tail = b""  # the end of the stream
        values, lengths, luts = encoding.book.values, encoding.book.lengths, encoding.book.luts
        pairs = pack.pair_table(values, lengths)
        self._book = (values.astype(np.uint64), lengths, pairs, unpack.lookup_table(luts), luts)

    def code(self, batch: _Batch) -> tuple[_Batch, EncodingBuffers, int]:
        """Packs and verifies a batch, in a workspace that the caller gives back; and the bytes that it completes."""
        space, unit = _buffers.take(), self._encoding.unit
        bit, stop = map(int, self._encoding.bits[batch.number : batch.number + 2])
        place = (batch.first, unit.numel, bit, stop)
        index = (self._gaps, self.positions)
        status = pack.code(batch.words, place, *self._book, space.rest, space.stream, *index, space.exponents)
        if status == pack.CHANGED or (status == pack.DIFFERENT and self._bits(batch) != stop - bit):
            raise CodecError(
                f"{unit.name}: the source changed while it was read, near weight {batch.first}; start again."
            )
        if status == pack.DIFFERENT:
            raise CodecError(
                f"{unit.name}: weights did not come back as they were coded, near weight {batch.first}; "
                "the memory of this machine or the source is changing under the encoder."
            )
        size = (stop >> 3) - (bit >> 3)
        if batch.first + batch.words.size == unit.numel and stop % 8:
            space.stream[size] |= self._encoding.book.padding(-stop % 8)
            size += 1
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

    def _bits(self, batch: _Batch) -> int:
        return int(_histogram(batch) @ self._encoding.book.lengths.astype(np.int64))
