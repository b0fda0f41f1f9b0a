"""Digests of files and of tensors in files: BLAKE3 for manifests, sha256 for comparison with the Hub and SHA256SUMS."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from blake3 import blake3

BLOCK = 1 << 18  # bytes read at a time: they are hashed while they are in the L2 cache


class Hash(Protocol):
    """A running digest, such as hashlib.sha256()."""

    def update(self, data: bytes | memoryview, /) -> object: ...


class Readable(Protocol):
    """A file opened for reading bytes."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


def tensors_digest(header: bytes, digests: Iterable[str]) -> str:
    """Digest of a safetensors file from its JSON header and the BLAKE3 of each tensor, in the order of the file.

    In this way every byte is hashed only once, for the digests of the tensors and that of the file.
    """
    return blake3(header + b"".join(map(bytes.fromhex, digests))).hexdigest()


def blake3_file(path: Path, also: Hash | None = None) -> str:
    """BLAKE3 of a file's bytes; `also` is updated with the same bytes."""
    with path.open("rb") as file:
        return blake3_of(file, path.stat().st_size, also)


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, the digest that the Hub, git LFS and SHA256SUMS use."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blake3_of(file: Readable, nbytes: int, also: Hash | None = None) -> str:
    """BLAKE3 of the next `nbytes` bytes of an open file (fewer at its end); `also` is updated with the same bytes."""
    total = blake3()
    for block in blocks(file, nbytes):
        total.update(block)
        if also is not None:
            also.update(block)
    return total.hexdigest()


def blocks(file: Readable, nbytes: int) -> Iterator[memoryview]:
    """The next `nbytes` bytes of an open file (fewer at its end), BLOCK at a time; each is valid until the next."""
    buffer = memoryview(bytearray(min(nbytes, BLOCK)))
    while nbytes > 0 and (count := file.readinto(buffer[: min(nbytes, BLOCK)])):
        yield buffer[:count]
        nbytes -= count
