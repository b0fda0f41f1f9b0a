"""Compares the files of a folder with its manifest: missing, changed and unlisted files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from bagel_compress.build.manifest import FileEntry
from bagel_compress.errors import ArtifactError
from bagel_compress.io.digests import Hash, blake3_file, blake3_of, tensors_digest
from bagel_compress.io.safe_paths import is_file
from bagel_compress.io.safetensors_file import TensorFile

# Unlisted files that are allowed, since validation, publishing or signing write them after the build.
EXTRAS = {"README.md", "LICENSE", "SHA256SUMS", "model.sig", "report.html", ".gitattributes"}
EXTRA_FOLDERS = {"reports", ".cache", ".git"}


def compared_file(folder: Path, name: str, files: Mapping[str, FileEntry], trust: bool = False) -> Path:
    """The path of a file that a manifest lists. Raises ArtifactError if it is not listed or, unless the folder is
    trusted, if its digest differs."""
    if name not in files:
        raise ArtifactError(f"{folder} has no {name} among the files of its manifest; copy it again.")
    path = folder / name
    if trust:
        return path
    try:
        same = intact(path, files[name])
    except OSError as fault:
        raise ArtifactError(f"{path} cannot be read ({fault.strerror}).") from None
    if not same:
        raise ArtifactError(f"{path} is not what the manifest says: it was changed or damaged; copy it again.")
    return path


def wrong_sizes(folder: Path, files: Mapping[str, FileEntry]) -> Iterator[str]:
    """A sentence per file of a manifest that is missing or has another size."""
    for name, entry in files.items():
        path = folder / name
        if not is_file(path):
            yield f"{name} is missing"
        elif path.stat().st_size != entry.bytes:
            yield f"{name} has {path.stat().st_size} bytes, the manifest says {entry.bytes}"


def changed_files(folder: Path, files: Mapping[str, FileEntry], sums: dict[str, str] | None = None) -> Iterator[str]:
    """Reads the files of a manifest that have the right size; yields the names of those with another digest.

    `sums`, if given, is filled with the sha256 of the others, computed in the same pass.
    """
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            continue
        if sums is None:
            whole = intact(path, entry)
        else:
            sha256 = intact_sha256(path, entry)
            whole = sha256 is not None
            if sha256 is not None:
                sums[name] = sha256
        if not whole:
            yield name


def extra_files(folder: Path, files: Mapping[str, FileEntry], manifest: str) -> Iterator[str]:
    """A sentence per file that is neither in the manifest nor one of those that are written after a build."""
    known = files.keys() | EXTRAS | {manifest}
    for path in (p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()):
        if path.as_posix() not in known and path.parts[0] not in EXTRA_FOLDERS:
            yield f"{path.as_posix()} is not in the manifest"


def intact(path: Path, entry: FileEntry) -> bool:
    """Whether the digest of the file is that of the entry. Reads the file."""
    return matches(path, entry, None)


def intact_sha256(path: Path, entry: FileEntry) -> str | None:
    """The sha256 of the file if its digest is that of the entry, else None. Reads the file once."""
    total = hashlib.sha256()
    return total.hexdigest() if matches(path, entry, total) else None


def matches(path: Path, entry: FileEntry, also: Hash | None) -> bool:
    """Whether the file's digest is that of the entry; if so, `also` has been updated with all its bytes."""
    if path.stat().st_size != entry.bytes:
        return False
    if not entry.blake3_tensors:
        return blake3_file(path, also) == entry.blake3
    try:
        file = TensorFile.open(path, ArtifactError)
    except ArtifactError:
        return False
    in_file = sorted(file.tensors.values(), key=lambda tensor: (tensor.start, tensor.stop))
    with path.open("rb") as opened:
        start = opened.read(8 + len(file.header))  # the tensors follow, without a gap, up to the end of the file
        if also is not None:
            also.update(start)
        digests = [blake3_of(opened, tensor.nbytes, also) for tensor in in_file]
    return tensors_digest(file.header, digests) == entry.blake3_tensors
