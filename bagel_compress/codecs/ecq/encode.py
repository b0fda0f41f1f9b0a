"""Coding one weight to nearest, in passes of bounded memory: count words, measure runs, then write and verify.

The first pass counts words, which gives the step; the second takes the coder's steps without writing, which gives the
bytes of every run, so that in the third each thread works on a batch of its own. If the coder makes more of the codes
than their frequencies promise, or less, the step is searched again for what is left. What was written is decoded again
and compared, word for word, before it is handed on.
Memory: a workspace of about 6 MB for each thread, reused from weight to weight, and two bytes per run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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
    sizes: np.ndarray = field(default_factory=lambda: np.empty(BATCH // RUN, np.int64))
    scratch: np.ndarray = field(default_factory=lambda: np.empty((4, pack.SCRATCH), np.uint8))


_workspaces = Workspaces(Workspace)


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive weights of the flat matrix, from a whole run on."""

    first: int
    words: np.ndarray


def batches(spec: TensorSpec, source: Reader) -> Iterator[Batch]:
    for start in range(0, spec.numel, BATCH):
        words = read_words(source, spec, start, min(start + BATCH, spec.numel))
        yield Batch(start, words if words.flags.aligned else words.copy())


def survey(spec: TensorSpec, source: Reader, codec: Codec) -> Search:
    """Counts the words of a weight. Raises CodecError on NaN, Inf and weights too large for any step."""

    def one(batch: Batch) -> np.ndarray:
        counts = np.zeros(1 << 16, np.uint32)
        pack.count(batch.words, counts)
        return counts

    total = np.zeros(1 << 16, np.int64)
    for counts in ordered(one, batches(spec, source)):
        total += counts
    if total[INFINITY_WORD:0x8000].any() or total[0x8000 + INFINITY_WORD :].any():
        raise not_finite(spec, codec)
    search = Search(total)
    if search.largest >= LARGEST:
        raise CodecError(
            f"{spec.name}: holds a weight of {search.largest:.3g}, codec {codec.format} has steps for weights below "
            f"{LARGEST:.3g}; give this tensor codec raw."
        )
    return search


class Coder:
    """The tables of a grid: codes batches in any thread."""

    def __init__(self, grid: StepGrid, search: Search) -> None:
        self.grid, self.tables = grid, tables_of(grid, search)
        self._form = (grid.book.low_bits, grid.book.escaping)
        self._book = pack.coder(grid.book.frequencies)
        self._lookup = unpack.decoder(grid.book.frequencies)
        self._check_values(search)

    def run_bytes(self, batch: Batch) -> np.ndarray:
        """int64: bytes of each run of a batch."""
        space, n = _workspaces.take(), batch.words.size
        sizes = np.empty(-(-n // RUN), np.int64)
        pack.look_up(batch.words, self.tables.symbols, space.symbols)
        pack.measure(space.symbols[:n], *self._form, *self._book, sizes)
        _workspaces.give(space)
        return sizes

    def code(self, batch: Batch, run_bytes: np.ndarray) -> Workspace | None:
        """Packs and verifies a batch in a workspace that the caller gives back; None if it does not come back.

        Symbols, low bits and escapes are compared as they come out of the bits: what values the first two stand for
        was compared for all of them when the tables were made.
        """
        space, n = _workspaces.take(), batch.words.size
        pack.look_up(batch.words, self.tables.symbols, space.symbols)
        if self.grid.book.low_bits:
            pack.look_up(batch.words, self.tables.lows, space.lows)
        symbols, lows, sizes = space.symbols[:n], space.lows[:n], space.sizes[: run_bytes.size]
        pack.pack(symbols, lows, batch.words, *self._form, *self._book, space.scratch, space.stream, sizes)
        if not np.array_equal(sizes, run_bytes):
            return None
        stream, offsets = space.stream.ctypes.data, np.concatenate([[0], np.cumsum(sizes)])
        whole = unpack.verify_runs(stream, offsets, self._lookup, *self._form, symbols, lows, batch.words)
        return space if whole else None

    def _check_values(self, search: Search) -> None:
        """The decoder's arithmetic gives the words that the quality is measured with, for every word of the weight."""
        symbols, lows = self.tables.symbols[search.words], self.tables.lows[search.words]
        found, kept = np.empty(symbols.size, np.uint16), symbols != ESCAPE
        unpack.values(symbols, lows, self.grid.book.low_bits, np.float32(self.grid.step), found)
        if not np.array_equal(found[kept], self.tables.decoded[search.words][kept]):
            raise CodecError("ecq: two ways to multiply codes with a step differ on this machine; report it.")


@dataclass(slots=True, kw_only=True)
class EcqEncoding(Encoding):
    """The last pass; made by `begin`."""

    spec: TensorSpec
    source: Reader
    coder: Coder
    run_bytes: np.ndarray  # int64

    def chunks(self) -> Iterator[Chunk]:
        name, at = self.spec.name, 0
        for start, space, size in ordered(self._code, batches(self.spec, self.source)):
            yield Chunk(f"{name}.stream", start, space.stream[:size], direct=True)
            at = start + size
            _workspaces.give(space)
        assert at == self.run_bytes.sum()
        grid = self.coder.grid
        yield Chunk(f"{name}.run_bytes", 0, self.run_bytes.astype("<u2").view(np.uint8))
        yield Chunk(f"{name}.book", 0, grid.book.stored().astype("<u2").view(np.uint8))
        yield Chunk(f"{name}.step", 0, np.array([grid.step], "<f4").view(np.uint8))

    def _code(self, batch: Batch) -> tuple[int, Workspace, int]:
        run = batch.first // RUN
        sizes = self.run_bytes[run : run + -(-batch.words.size // RUN)]
        space = self.coder.code(batch, sizes)
        if space is None:
            raise CodecError(
                f"{self.spec.name}: weights did not come back as they were coded, near weight {batch.first}; "
                "the source was changed while it was read, or the memory of this machine is failing: start again."
            )
        return int(self.run_bytes[:run].sum()), space, int(sizes.sum())


def fitted(spec: TensorSpec, source: Reader, search: Search, most: Sizes) -> tuple[Coder, np.ndarray]:
    """The coder of the finest step whose parts are at most as large as `most`, and the bytes of its runs."""
    limit, target = 8 * most.nbytes, 8.0 * most.nbytes - margin(spec.numel)
    best: tuple[Coder, np.ndarray] | None = None
    for attempt in range(SEARCHES + 1):
        coder = Coder(search.find(target if attempt < SEARCHES else 0.0), search)
        run_bytes = np.concatenate(list(ordered(coder.run_bytes, batches(spec, source))))
        sizes = Sizes(spec.numel, int(run_bytes.sum()), coder.grid.book.symbols)
        spare = limit - 8 * sizes.nbytes
        if spare >= 0 and (best is None or run_bytes.sum() > best[1].sum()):
            best = coder, run_bytes
        if 0 <= spare < CLOSE * spec.numel or (spare >= 0 and _saturated(coder.grid, target)):
            break
        if best is not None and attempt == SEARCHES - 1:
            break
        target += spare - margin(spec.numel)
    assert best is not None, "codes that are all zero take the least that a plan allows"
    return best


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
    """Counts and measures a weight. Raises CodecError on values that the format does not hold."""
    search = survey(spec, source, codec)
    coder, run_bytes = fitted(spec, source, search, most)
    sizes = Sizes(spec.numel, int(run_bytes.sum()), coder.grid.book.symbols)
    return EcqEncoding(
        codec=codec, parts=sizes.parts(spec.name), quality=quality_of(search, coder.tables), spec=spec,
        source=source, coder=coder, run_bytes=run_bytes,
    )  # fmt: skip
