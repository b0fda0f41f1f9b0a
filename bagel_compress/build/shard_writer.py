"""ShardWriter: writes safetensors files from background threads, with a few reused buffers.

The layout is known before the data (`safetensors_file.lay_out`), so chunks may come in any order. While chunks are
written, and while a written file is read back, hashed and synced, encoding continues, also of the next shard. Buffers
are allocated once, since the first access to new memory is slow. A file gets its final name only when it is complete.
"""

from __future__ import annotations

import errno
import os
import queue
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from threading import BoundedSemaphore, get_ident

import numpy as np

from bagel_compress.codecs.base import Chunk, LaterChunk
from bagel_compress.errors import CodecError
from bagel_compress.io.atomic import PARTIAL, sync_folder
from bagel_compress.io.digests import Hash, blake3_of
from bagel_compress.io.safetensors_file import lay_out
from bagel_compress.io.tensor_spec import PartSpec

PIECE = 8 << 20  # bytes written at once
BUFFERS = 6  # one being filled, one being written, and some between, since encoding and writing differ in speed
LASTING = 128  # chunks in lasting memory that may wait, so that tensors copied unchanged do not delay encoding
SYNC_BYTES = 192 << 20  # bytes between two fsyncs; without them the disk would be idle until the end of a shard


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A complete file: its JSON header, and the BLAKE3 of each part as read back, in the order of the file."""

    nbytes: int
    header: bytes
    parts: dict[str, str]


class ShardWriter:
    """Writes shards one after the other: call `begin`, any number of `put`, `end`. Use it as a context manager."""

    def __init__(self) -> None:
        self._writing = ThreadPoolExecutor(1, "write")
        self._copying = ThreadPoolExecutor(1, "copy")  # writes lasting chunks, so that buffers need not wait for them
        self._finishing = ThreadPoolExecutor(2, "finish")
        self._syncing = ThreadPoolExecutor(2, "sync")
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(np.empty(PIECE, np.uint8))
        self._lasting = BoundedSemaphore(LASTING)
        self._given = BoundedSemaphore(BUFFERS)
        self._shards: list[_OpenShard] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._writing.shutdown(cancel_futures=True)
        self._copying.shutdown(cancel_futures=True)
        self._finishing.shutdown(cancel_futures=True)
        self._syncing.shutdown()
        for shard in self._shards:
            shard.close()

    def begin(self, path: Path, parts: Mapping[str, PartSpec], watched: Mapping[str, Hash] | None = None) -> None:
        """Starts the file `path` with exactly these parts.

        `watched`, by part, are updated with the part's bytes when the finished file is read back.
        """
        header, offsets = lay_out(parts)
        size = len(header) + sum(part.nbytes for part in parts.values())
        partial = path.with_name(path.name + PARTIAL)
        file = partial.open("w+b", buffering=0)
        shard = _OpenShard(path, partial, {get_ident(): file}, header, offsets, dict(parts), size, watched or {})
        self._shards.append(shard)
        _reserve(file, size)
        shard.write(0, header)

    def put(self, chunk: Chunk | LaterChunk) -> None:
        """Queues a chunk to be written by a background thread; copies it first unless its memory lasts or is given.

        A `direct` chunk is written before the method returns. Raises errors of background threads.
        """
        shard = self._shards[-1]
        nbytes = chunk.nbytes if isinstance(chunk, LaterChunk) else chunk.data.nbytes
        stop = chunk.start + nbytes
        if chunk.part not in shard.parts or chunk.start < 0 or stop > shard.parts[chunk.part].nbytes:
            raise CodecError(
                f"{chunk.part}: bytes {chunk.start} to {stop} lie outside of what was announced; codec fault."
            )
        shard.filled[chunk.part] += nbytes
        where = shard.offsets[chunk.part] + chunk.start
        if isinstance(chunk, Chunk) and chunk.direct:
            shard.write(where, chunk.data.reshape(-1).data)
        elif isinstance(chunk, LaterChunk) or chunk.lasting:
            self._lasting.acquire()
            shard.pending.append(self._copying.submit(self._write_lasting, shard, where, chunk))
        elif chunk.given:
            self._given.acquire()
            shard.pending.append(self._writing.submit(self._write_given, shard, where, chunk))
        else:
            data = chunk.data.reshape(-1)
            for start in range(0, nbytes, PIECE):
                piece, buffer = data[start : start + PIECE], self._free.get()
                buffer[: piece.nbytes] = piece
                writing = self._writing.submit(self._write_buffer, shard, where + start, buffer, piece.nbytes)
                shard.pending.append(writing)
        shard.raise_failures()
        shard.sync_early(self._syncing)

    def end(self) -> Future[WrittenShard]:
        """Ends the file, after the last `put`. The future is done when it is written, hashed, synced and renamed."""
        shard = self._shards[-1]
        for part, spec in shard.parts.items():
            if shard.filled[part] != spec.nbytes:
                raise CodecError(f"{part}: {shard.filled[part]} of {spec.nbytes} bytes were coded; codec fault.")
        return self._finishing.submit(_finish, shard, self._syncing)

    def _write_lasting(self, shard: _OpenShard, where: int, chunk: Chunk | LaterChunk) -> None:
        try:
            shard.write(where, chunk.data.reshape(-1).data)
        finally:
            self._lasting.release()

    def _write_given(self, shard: _OpenShard, where: int, chunk: Chunk) -> None:
        try:
            shard.write(where, chunk.data.reshape(-1).data)
        finally:
            self._given.release()

    def _write_buffer(self, shard: _OpenShard, where: int, buffer: np.ndarray, nbytes: int) -> None:
        try:
            shard.write(where, buffer[:nbytes].data)
        finally:
            self._free.put(buffer)


@dataclass(slots=True)
class _OpenShard:
    path: Path
    partial: Path
    handles: dict[int, FileIO]  # by thread, since a handle has one position
    header: bytes
    offsets: dict[str, int]
    parts: dict[str, PartSpec]
    size: int
    watched: Mapping[str, Hash]
    filled: Counter[str] = field(default_factory=Counter)
    pending: list[Future[None]] = field(default_factory=list)
    synced: int = 0  # bytes that were written when the last fsync began
    syncing: Future[None] | None = None

    def handle(self) -> FileIO:
        """This thread's handle of the file."""
        file = self.handles.get(get_ident())
        if file is None:
            file = self.handles[get_ident()] = self.partial.open("r+b", buffering=0)
        return file

    def write(self, where: int, data: bytes | memoryview) -> None:
        """Writes at byte `where` of the file, with several calls if an unbuffered write takes only a part."""
        file, rest = self.handle(), memoryview(data)
        file.seek(where)
        while rest:
            rest = rest[file.write(rest) :]

    def raise_failures(self) -> None:
        """Raises the error of a failed background write; forgets the finished ones."""
        for write in [w for w in self.pending if w.done()]:
            write.result()
            self.pending.remove(write)

    def sync_early(self, pool: ThreadPoolExecutor) -> None:
        """Starts an fsync when at least SYNC_BYTES were written since the last one began and none is running."""
        total = self.filled.total()
        if total - self.synced >= SYNC_BYTES and (self.syncing is None or self.syncing.done()):
            self.synced, self.syncing = total, pool.submit(os.fsync, self.handle().fileno())
            self.pending.append(self.syncing)

    def close(self) -> None:
        for file in self.handles.values():
            file.close()


def _finish(shard: _OpenShard, syncing: ThreadPoolExecutor) -> WrittenShard:
    """Reads the file back (from the page cache) and hashes it while it is synced to the disk, then renames it."""
    try:
        for write in shard.pending:
            write.result()
        file = shard.handle()
        synced = syncing.submit(os.fsync, file.fileno())
        file.seek(0)
        if file.read(len(shard.header)) != shard.header:
            raise OSError(f"{shard.partial} is not what was written to it")
        digests = {p: blake3_of(file, shard.parts[p].nbytes, shard.watched.get(p)) for p in shard.offsets}
        if file.tell() != shard.size:
            raise OSError(f"{shard.partial} became shorter while it was written")
        synced.result()
    finally:
        shard.close()
    os.replace(shard.partial, shard.path)
    sync_folder(shard.path.parent)
    return WrittenShard(shard.size, shard.header[8:], digests)


def _reserve(file: FileIO, size: int) -> None:
    """Sets the file's size, and allocates its blocks if the system supports it, which is faster than while writing."""
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # not supported by the file system
                raise
