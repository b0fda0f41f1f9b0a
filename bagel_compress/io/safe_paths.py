"""Names of files that come from a file somebody else wrote: they must stay inside of their folder, on any system."""

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


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder; False where no system takes the name (too long, or with a NUL)."""
    try:
        Path(path).stat()
    except (OSError, ValueError):
        return False
    return True


def is_file(path: str | Path) -> bool:
    """Whether there is such a file, no folder, pipe or device; False as of `exists`."""
    return exists(path) and Path(path).is_file()


def leads_away(path: Path, folder: Path) -> bool:
    """True if `path`, which lies in `folder`, is reached by a link that leaves the folder.

    The links of the Hub's cache do not count: from a snapshot to a blob of the same repository.
    """
    target = path.resolve()
    if folder.resolve() in target.parents:
        return False
    places = [parent for parent in path.absolute().parents if parent.name.startswith(("models--", "datasets--"))]
    return not any(place.resolve() / "blobs" in target.parents for place in places)


def check_names(names: Iterable[str], listing: Path, error: type[BagelCompressError]) -> None:
    """Raises `error` if a file that the file `listing` names would lie outside of its folder."""
    for name in names:
        if not stays_inside(name):
            raise error(f"{listing} points outside its folder ({name}); do not use what lies there.")
