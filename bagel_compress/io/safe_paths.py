"""Checks file names from untrusted files: they must not lead out of their folder, on any system."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from bagel_compress.errors import BagelCompressError


def stays_inside(name: str) -> bool:
    """True if `name` is a relative path with / between its parts that cannot lead out of its folder.

    Refused on every system, because a folder may be read on another one: absolute paths, "..", backslashes, colons
    (drives and streams of Windows), and names of the folder itself ("" and ".").
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not (path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name)


def encodable(text: str) -> bool:
    """False if a text from JSON holds half a character (an unpaired surrogate), which files and tokenizers refuse."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def exists(path: str | Path) -> bool:
    """Whether the file or folder exists; False if the name is impossible (too long, or with a NUL)."""
    try:
        Path(path).stat()
    except (OSError, ValueError):
        return False
    return True


def is_file(path: str | Path) -> bool:
    """Whether the path is an existing regular file; False if the name is impossible."""
    return exists(path) and Path(path).is_file()


def leads_away(path: Path, folder: Path) -> bool:
    """True if `path`, a path in `folder`, is a symbolic link to a file outside the folder.

    Links in the Hub's cache, from a snapshot to a blob of the same repository, are allowed.
    """
    target = path.resolve()
    if folder.resolve() in target.parents:
        return False
    places = [parent for parent in path.absolute().parents if parent.name.startswith(("models--", "datasets--"))]
    return not any(place.resolve() / "blobs" in target.parents for place in places)


def check_names(names: Iterable[str], listing: Path, error: type[BagelCompressError]) -> None:
    """Raises `error` if one of the names, which the file `listing` contains, leads out of its folder."""
    for name in names:
        if not stays_inside(name):
            raise error(f"{listing} points outside its folder ({name}); do not use these files.")
