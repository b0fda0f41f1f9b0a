"""ShardWriter: fills safetensors files in place, from a background thread, with a few reused buffers.

The layout is known before the data (`tensorfile.lay_out`), so chunks may come in any order. Encoding goes on while a
chunk is written, and while the finished shard before it is hashed, synced and renamed. Buffers are made once: fresh
memory is slow to touch. Portable seek and write; the file appears under its name only when it is complete.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from blake3 import blake3

from bagel_compress.codecs.base import Chunk
from bagel_compress.errors import CodecError
from bagel_compress.spec import PartSpec
from bagel_compress.tensorfile import lay_out

BUFFER = 8 << 20  # bytes
BUFFERS = 6  # being filled, being written, and a few between, since encoding and writing do not keep step
HASH_BLOCK = 1 << 20
PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """BLAKE3 digests of a complete file and of each part, read back from the file."""

    nbytes: int
    blake3: str
    parts: dict[str, str]


class ShardWriter:
    """Writes one shard at a time: `begin`, any number of `put`, `end`. Use as a context manager."""

    def __init__(self) -> None:
        self._writing = ThreadPoolExecutor(1, "write")
        self._finishing = ThreadPoolExecutor(2, "finish")
        self._syncing = ThreadPoolExecutor(2, "sync")
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(np.empty(BUFFER, np.uint8))
        self._open: _OpenShard | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._writing.shutdown(cancel_futures=True)
        self._finishing.shutdown(cancel_futures=True)
        self._syncing.shutdown()
        if self._open is not None:
            self._open.file.close()

    def begin(self, path: Path, parts: Mapping[str, PartSpec]) -> None:
        """Starts the file `path` with exactly these parts."""
        header, offsets = lay_out(parts)
        size = len(header) + sum(part.nbytes for part in parts.values())
        file = path.with_name(path.name + PARTIAL).open("w+b")
        self._open = _OpenShard(path, file, header, offsets, dict(parts), size, dict.fromkeys(parts, 0), [])
        file.truncate(size)
        file.write(header)

    def put(self, chunk: Chunk) -> None:
        """Copies the chunk into free buffers and leaves them to the background thread. Raises what that met."""
        shard = self._open
        assert shard is not None
        stop = chunk.start + chunk.data.nbytes
        if chunk.part not in shard.parts or chunk.start < 0 or stop > shard.parts[chunk.part].nbytes:
            raise CodecError(
                f"{chunk.part}: bytes {chunk.start} to {stop} lie outside of what was announced; codec fault."
            )
        shard.filled[chunk.part] += chunk.data.nbytes
        data = chunk.data.reshape(-1)
        for start in range(0, data.nbytes, BUFFER):
            piece = data[start : start + BUFFER]
            buffer = self._free.get()
            buffer[: piece.nbytes] = piece
            where = shard.offsets[chunk.part] + chunk.start + start
            shard.pending.append(self._writing.submit(self._write, shard.file, where, buffer, piece.nbytes))
        shard.raise_failures()

    def end(self) -> Future[WrittenShard]:
        """Every byte was put. The result is there when the file is hashed, synced and under its name."""
        shard, self._open = self._open, None
        assert shard is not None
        for part, spec in shard.parts.items():
            if shard.filled[part] != spec.nbytes:
                shard.file.close()
                raise CodecError(f"{part}: {shard.filled[part]} of {spec.nbytes} bytes were coded; codec fault.")
        for write in shard.pending:
            write.result()
        return self._finishing.submit(_finish, shard, self._syncing)

    def _write(self, file: BinaryIO, where: int, buffer: np.ndarray, nbytes: int) -> None:
        try:
            file.seek(where)
            file.write(buffer[:nbytes].data)
        finally:
            self._free.put(buffer)


@dataclass(slots=True)
class _OpenShard:
    path: Path
    file: BinaryIO
    header: bytes
    offsets: dict[str, int]
    parts: dict[str, PartSpec]
    size: int
    filled: dict[str, int]
    pending: list[Future[None]]

    def raise_failures(self) -> None:
        """Re-raises what a finished background write met, and forgets the ones that went well."""
        for write in [w for w in self.pending if w.done()]:
            write.result()
            self.pending.remove(write)


def _finish(shard: _OpenShard, syncing: ThreadPoolExecutor) -> WrittenShard:
    """Reads the file back (from the page cache) while it goes to the disk, then gives it its name."""
    block = memoryview(bytearray(HASH_BLOCK))
    with shard.file as file:
        file.flush()
        synced = syncing.submit(os.fsync, file.fileno())
        total = blake3()
        file.seek(0)
        total.update(file.read(len(shard.header)))
        digests = {}
        for part in sorted(shard.offsets, key=lambda name: shard.offsets[name]):
            digests[part] = _hash(file, shard.parts[part].nbytes, total, block)
        synced.result()
    os.replace(file.name, shard.path)
    sync_folder(shard.path.parent)
    return WrittenShard(shard.size, total.hexdigest(), digests)


def _hash(file: BinaryIO, nbytes: int, total: blake3, block: memoryview) -> str:
    """BLAKE3 of the next `nbytes`, which also enter `total`; read into `block`, because fresh memory is slow."""
    own = blake3()
    while nbytes > 0:
        count = file.readinto(block[: min(nbytes, len(block))])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{file.name} became shorter while it was written")
        own.update(block[:count])
        total.update(block[:count])
        nbytes -= count
    return own.hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a small file so that it is there in full or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames last through a power cut where the system lets a folder be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
