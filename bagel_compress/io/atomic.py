"""Atomic writes: a file is there in full or not at all, also after a power cut."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"  # suffix of a file that is being written; it is renamed when it is complete


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
