"""Coding one weight to nearest in two readings: count words, then code, verify and keep the bits.

The counts give the step and the book. The weights are then coded batch by batch, each thread a batch of its own, and
what was written is decoded again and compared while it is in the cache. How many bytes a run takes is only known then,
so the bits are kept until the last batch is done. If the coder made more of the codes than their frequencies promise,
or much less, the step is searched again for what is left, and the weights are coded once more: rare.
Memory: the stored bits of one weight (35 MB for an MLP weight at 4.13 bits, 490 MB for the embedding at 7.17) and a
workspace of about 6 MB for each thread, reused from weight to weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from bagel_compress.codecs.base import Chunk, Codec, Encoding, Quality, Reader
from bagel_compress.codecs.ecq import pack, unpack
from bagel_compress.codecs.ecq.layout import ESCAPE, HEADER_BYTES, MAX_LOW_BITS, RUN, STATE_BITS, Sizes
from bagel_compress.codecs.ecq.step import LARGEST, Search, StepGrid, Tables, tables_of
from bagel_compress.codecs.kernels.threads import Workspaces, ordered
from bagel_compress.codecs.matrix import INFINITY_WORD, as_floats, not_finite, read_words
from bagel_compress.errors import CodecError
from bagel_compress.io.tensor_spec import TensorSpec

BATCH = 1 << 20  # weights that one thread codes at a time: 512 runs
WORST_RUN = HEADER_BYTES + RUN * (STATE_BITS + MAX_LOW_BITS + 16) // 8 + 8  # bytes
SEARCHES = 4  # times that the step is searched with the coder's own figures
CLOSE = 0.01  # bits a weight: nearer to the rate than this needs no other search


@dataclass(slots=True)
class Workspace:
    """What one batch needs."""

    symbols: np.ndarray = field(default_factory=lambda: np.empty(BATCH + 8, np.uint8))
    lows: np.ndarray = field(default_factory=lambda: np.empty(BATCH + 8, np.uint8))
    stream: np.ndarray = field(default_factory=lambda: np.empty(BATCH // RUN * WORST_RUN + unpack.READ_SLACK, np.uint8))
    pieces: np.ndarray = field(default_factory=lambda: np.empty((pack.TOGETHER, pack.PIECES // 4), np.uint64))
    joined: np.ndarray = field(default_factory=lambda: np.empty((2, RUN // 4), np.uint64))

    @property
    def scratch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `pack.pack` writes to."""
        return self.pieces, self.joined, self.stream


_workspaces = Workspaces(Workspace)


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive weights of the flat matrix, from a whole run on."""

    first: int
    words: np.ndarray

    @property
    def checksum(self) -> int:
        """Of the words, to notice a source that changes between two readings."""
        whole = self.words.size & ~3
        return int(self.words[:whole].view(np.uint64).sum()) ^ int(self.words[whole:].sum())


@dataclass(frozen=True, slots=True)
class Coded:
    """Runs that were packed and verified: uint8 bits and the int64 bytes of each run."""

    stream: np.ndarray
    run_bytes: np.ndarray


def batches(spec: TensorSpec, source: Reader) -> Iterator[Batch]:
    for start in range(0, spec.numel, BATCH):
        words = read_words(source, spec, start, min(start + BATCH, spec.numel))
        yield Batch(start, words if words.flags.aligned else words.copy())


def survey(spec: TensorSpec, source: Reader, codec: Codec) -> tuple[Search, list[int]]:
    """Counts the words of a weight; and checksums of the batches. Raises CodecError on NaN, Inf and too large ones."""

    def one(batch: Batch) -> tuple[np.ndarray, int]:
        counts = np.zeros(1 << 16, np.uint32)
        pack.count(batch.words, counts)
        return counts, batch.checksum

    total, checksums = np.zeros(1 << 16, np.int64), []
    for counts, checksum in ordered(one, batches(spec, source)):
        total += counts
        checksums.append(checksum)
    if total[INFINITY_WORD:0x8000].any() or total[0x8000 + INFINITY_WORD :].any():
        raise not_finite(spec, codec)
    search = Search(total)
    if search.largest >= LARGEST:
        raise CodecError(
            f"{spec.name}: holds a weight of {search.largest:.3g}, codec {codec.format} has steps for weights below "
            f"{LARGEST:.3g}; give this tensor codec raw."
        )
    return search, checksums


class Coder:
    """The tables of a grid: codes batches in any thread."""

    def __init__(self, grid: StepGrid, search: Search) -> None:
        self.grid, self.tables = grid, tables_of(grid, search)
        self._form = (grid.book.low_bits, grid.book.escaping)
        self._book = pack.coder(grid.book.frequencies)
        self._lookup = unpack.decoder(grid.book.frequencies)
        self._check_values(search)

    def code(self, batch: Batch) -> Coded | None:
        """Packs and verifies a batch; None if it does not come back.

        Symbols, low bits and escapes are compared as they come out of the bits: what values the first two stand for
        was compared for all of them when the tables were made.
        """
        space, n = _workspaces.take(), batch.words.size
        pack.look_up(batch.words, self.tables.symbols, space.symbols)
        if self.grid.book.low_bits:
            pack.look_up(batch.words, self.tables.lows, space.lows)
        symbols, lows, sizes = space.symbols[:n], space.lows[:n], np.empty(-(-n // RUN), np.int64)
        size = pack.pack(symbols, lows, batch.words, *self._form, *self._book, *space.scratch, sizes)
        stream, offsets = space.stream.ctypes.data, np.concatenate([[0], np.cumsum(sizes)])
        whole = unpack.verify_runs(stream, offsets, self._lookup, *self._form, symbols, lows, batch.words)
        coded = Coded(space.stream[:size].copy(), sizes)
        _workspaces.give(space)
        return coded if whole else None

    def _check_values(self, search: Search) -> None:
        """The decoder's arithmetic gives the words that the quality is measured with, for every word of the weight."""
        symbols, lows = self.tables.symbols[search.words], self.tables.lows[search.words]
        found, kept = np.empty(symbols.size, np.uint16), symbols != ESCAPE
        unpack.values(symbols, lows, self.grid.book.low_bits, np.float32(self.grid.step), found)
        if not np.array_equal(found[kept], self.tables.decoded[search.words][kept]):
            raise CodecError("ecq: two ways to multiply codes with a step differ on this machine; report it.")


@dataclass(slots=True, kw_only=True)
class EcqEncoding(Encoding):
    """A weight that is coded and verified; made by `begin`."""

    spec: TensorSpec
    grid: StepGrid
    coded: list[Coded]

    def chunks(self) -> Iterator[Chunk]:
        name, at = self.spec.name, 0
        for batch in self.coded:
            yield Chunk(f"{name}.stream", at, batch.stream, lasting=True)
            at += batch.stream.size
        yield Chunk(f"{name}.run_bytes", 0, run_bytes(self.coded).astype("<u2").view(np.uint8))
        yield Chunk(f"{name}.book", 0, self.grid.book.stored().astype("<u2").view(np.uint8))
        yield Chunk(f"{name}.step", 0, np.array([self.grid.step], "<f4").view(np.uint8))


def run_bytes(coded: list[Coded]) -> np.ndarray:
    """int64: bytes of every run."""
    return np.concatenate([batch.run_bytes for batch in coded])


class Coding:
    """Codes all batches of a weight with one coder after another, until the step fits."""

    def __init__(self, spec: TensorSpec, source: Reader, search: Search, checksums: list[int]) -> None:
        self._spec, self._source, self._search, self._checksums = spec, source, search, checksums

    def fitted(self, most: Sizes) -> tuple[Coder, list[Coded]]:
        """The coder of the finest step whose parts are at most as large as `most`, and what it made of the weight."""
        weights, limit = self._spec.numel, 8 * most.nbytes
        target = limit - margin(weights)
        best: tuple[int, Coder, list[Coded]] | None = None
        for attempt in range(SEARCHES + 1):
            coder = Coder(self._search.find(target if attempt < SEARCHES else 0.0), self._search)
            coded = list(ordered(partial(self._code, coder), batches(self._spec, self._source)))
            size = sum(batch.stream.size for batch in coded)
            spare = limit - 8 * Sizes(weights, size, coder.grid.book.symbols).nbytes
            if spare >= 0 and (best is None or size > best[0]):
                best = size, coder, coded
            if 0 <= spare < CLOSE * weights or (spare >= 0 and _saturated(coder.grid, target)):
                break
            if best is not None and attempt == SEARCHES - 1:
                break
            target += spare - margin(weights)
        assert best is not None, "codes that are all zero take the least that a plan allows"
        return best[1:]

    def _code(self, coder: Coder, batch: Batch) -> Coded:
        coded = coder.code(batch) if batch.checksum == self._checksums[batch.first // BATCH] else None
        if coded is None:
            raise CodecError(
                f"{self._spec.name}: weights did not come back as they were coded, near weight {batch.first}; "
                "the source was changed while it was read, or the memory of this machine is failing: start again."
            )
        return coded


def margin(weights: int) -> float:
    """Bits that a search leaves free for what the coder makes of the codes beyond their frequencies."""
    return 0.002 * weights + 0.3 * float(np.sqrt(weights))


def _saturated(grid: StepGrid, target: float) -> bool:
    """Whether a finer step would not bring the bits nearer to the target: they jump over it."""
    return grid.bits < target - 100


def quality_of(search: Search, tables: Tables) -> Quality:
    """Energies of the weights and of the errors, exactly, from the counts of words."""
    decoded = as_floats(tables.decoded[search.words]).astype(np.float64)
    return Quality(float(search.values**2 @ search.counts), float((search.values - decoded) ** 2 @ search.counts))


def begin(codec: Codec, spec: TensorSpec, source: Reader, most: Sizes) -> EcqEncoding:
    """Counts, codes and verifies a weight. Raises CodecError on values that the format does not hold."""
    search, checksums = survey(spec, source, codec)
    coder, coded = Coding(spec, source, search, checksums).fitted(most)
    sizes = Sizes(spec.numel, sum(batch.stream.size for batch in coded), coder.grid.book.symbols)
    return EcqEncoding(
        codec=codec, parts=sizes.parts(spec.name), quality=quality_of(search, coder.tables), spec=spec,
        grid=coder.grid, coded=coded,
    )  # fmt: skip
