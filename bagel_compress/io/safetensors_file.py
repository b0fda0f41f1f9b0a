"""The safetensors format: reads and checks untrusted headers, and lays files out byte for byte as `save_file` does.

The library is not used, because a build has to know every offset before any data exists, and because a damaged source
has to give a clear error. Header length, JSON, dtypes, shapes, offsets, overlaps, holes and the file's size are
checked. Tensor data is either read (`read`) or memory-mapped (`bytes`). If a mapped file is truncated, the next access
kills the process; so sources, which users may change meanwhile, are read.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeGuard

from bagel.errors import shown
from bagel_compress.errors import BagelCompressError, CheckpointError
from bagel_compress.io.buffers import Buffers
from bagel_compress.io.tensor_spec import DTYPE_BYTES, PartSpec

if TYPE_CHECKING:
    import numpy as np

MAX_AXES = 8  # of a tensor; the model's tensors have at most four
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library (0.8, `MAX_HEADER_SIZE`)
# The order in which `safetensors.serialize_file` 0.8 places tensors: by dtype in this order, then by name.
DTYPE_ORDER = {code: rank for rank, code in enumerate(DTYPE_BYTES)}
_buffers = Buffers()
_seeking = Lock()  # for systems without preadv, where a read is a seek and a read


@dataclass(frozen=True, slots=True)
class StoredTensor(PartSpec):
    """A tensor of a file; `start` and `stop` are byte offsets from the start of the file."""

    start: int
    stop: int


Stamp = tuple[int, int, int, int, int]


def stamp_of(path: Path) -> Stamp | None:
    """A value that changes when a file is written to, truncated or replaced; None if the file is missing."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None


def _stamp(status: os.stat_result) -> Stamp:
    """Size, mtime and ctime in ns, inode, device. Unlike mtime, ctime cannot be set back by a tool."""
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was read and checked; `stamp` is `stamp_of` it at that time."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    header: bytes
    stamp: Stamp

    @classmethod
    def open(cls, path: Path, error: type[BagelCompressError] = CheckpointError) -> TensorFile:
        """Reads and checks the header. Raises `error` on anything that violates the format."""
        if path.exists() and not path.is_file():
            raise error(f"{path} is no file; give a safetensors file.")
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                header = file.read(_header_length(file.read(8), status.st_size, path, error))
        except OSError as fault:
            raise error(f"{path} cannot be read ({fault.strerror}).") from None
        table, metadata = _parse(header, path, error)
        base = 8 + len(header)
        tensors = {name: _stored(name, row, base, path, error) for name, row in table.items()}
        _check_cover(tensors, base, status.st_size, path, error)
        return cls(path, tensors, metadata, header, _stamp(status))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of the file as uint8, in a buffer that is reused when nothing refers to it any more.

        Raises CheckpointError if the file was truncated.
        """
        data = _buffers.take(stop - start)
        with _disk_faults(self.path):
            if _read_at(self._handle, data.data, start) != stop - start:
                raise CheckpointError(f"{self.path} was cut while it was read; start again with the finished file.")
        return data

    @cached_property
    def _handle(self) -> FileIO:
        return self.path.open("rb", buffering=0)

    @cached_property
    def bytes(self) -> np.ndarray:
        """The whole file as a read-only memory-mapped uint8 array."""
        import numpy as np

        with self.path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)

    def changed(self) -> bool:
        """True if the file has changed since its header was read."""
        return stamp_of(self.path) != self.stamp


@contextmanager
def _disk_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise CheckpointError(f"{path} cannot be read ({fault.strerror}).") from None


def _read_at(file: FileIO, data: memoryview, where: int) -> int:
    """Fills `data` from byte `where` of the file, up to its end; thread-safe. Returns the number of bytes read."""
    done = 0
    while done < len(data):
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [data[done:]], where + done)
        else:
            with _seeking:
                file.seek(where + done)
                count = file.readinto(data[done:]) or 0
        if not count:
            break
        done += count
    return done


def lay_out(parts: Mapping[str, PartSpec], metadata: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """Header bytes (length prefix included) and the offset of each part in the file, in the order of the file.

    Byte-identical to `safetensors.torch.save_file(..., metadata={"format": "pt"})`: parts by dtype, then by name;
    compact JSON; spaces up to a multiple of 8 bytes. `metadata` is added to the "format" entry.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    position = 0
    for name in sorted(parts, key=lambda n: (DTYPE_ORDER[parts[n].dtype], n)):
        part = parts[name]
        stop = position + part.nbytes
        table[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    offsets = {name: base + row["data_offsets"][0] for name, row in table.items() if name != "__metadata__"}
    return struct.pack("<Q", len(text)) + text, offsets


def file_bytes(parts: Mapping[str, PartSpec]) -> int:
    """Size of the file that `lay_out` describes."""
    return len(lay_out(parts)[0]) + sum(part.nbytes for part in parts.values())


def _header_length(prefix: bytes, size: int, path: Path, error: type[BagelCompressError]) -> int:
    if len(prefix) < 8:
        raise error(f"{path} has {size} bytes; a safetensors file starts with an 8-byte header length. Copy it again.")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise error(f"{path} is not a safetensors file: its first 8 bytes would mean a header of {length} bytes.")
    if 8 + length > size:
        raise error(f"{path} is truncated: {size} bytes, its header alone needs {8 + length}. Copy it again.")
    return int(length)


def _parse(
    header: bytes, path: Path, error: type[BagelCompressError]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    try:
        table = json.loads(header)
    except (ValueError, RecursionError):  # ValueError: no UTF-8, no JSON, integers of 5,000 digits
        raise error(f"{path} is not a safetensors file: its header is not JSON.") from None
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise error(f"{path} is not a safetensors file: its header is not a table of tensors.")
    metadata = table.pop("__metadata__", {})
    return table, {str(k): str(v) for k, v in metadata.items()}


def _stored(name: str, row: Mapping[str, Any], base: int, path: Path, error: type[BagelCompressError]) -> StoredTensor:
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise error(f"{path}: tensor {name} has dtype {shown(dtype)}, expected one of {', '.join(DTYPE_BYTES)}.")
    if not _naturals(shape) or len(shape) > MAX_AXES or not _naturals(offsets) or len(offsets) != 2:
        raise error(
            f"{path}: tensor {name} has shape {shown(shape)} and offsets {shown(offsets)}; the header is damaged."
        )
    needed = prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        found = offsets[1] - offsets[0]
        raise error(
            f"{path}: tensor {name} takes {found} bytes, {dtype} {shape} needs {needed}; the header is damaged."
        )
    return StoredTensor(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def _check_cover(
    tensors: Mapping[str, StoredTensor], base: int, size: int, path: Path, error: type[BagelCompressError]
) -> None:
    """Raises `error` unless the tensors cover the data area without overlap or hole, and nothing follows them."""
    end, last = base, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            fault = "overlaps" if tensor.start < end else "leaves a hole after"
            raise error(f"{path}: tensor {name} {fault} {last}; the header is damaged.")
        end, last = tensor.stop, name
    if end > size:
        raise error(f"{path} is truncated: {size} bytes, its header promises {end}. Copy it again.")
    if end < size:
        raise error(f"{path} has {size - end} bytes behind its last tensor; it is damaged. Copy it again.")
