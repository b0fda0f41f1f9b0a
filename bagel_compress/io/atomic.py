"""Atomic writes: a file appears under its name only when it is complete, also after a power failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # suffix of a file that is being written; it is renamed when it is complete


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a small file, text as UTF-8, and creates its folder if it is missing."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write bytes to; it appears under `path` when the `with` block is left. See `atomic_path`."""
    with atomic_path(path) as partial, partial.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under; synced and renamed to `path` when the `with` block is left.

    If the block raises, the partial file is removed and `path` is unchanged. The folder of `path` is created if it is
    missing; an existing file is replaced. If `path` exists and is no regular file (/dev/null, a pipe), it is written to
    directly.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that renames in it survive a power failure; only POSIX systems support this."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
