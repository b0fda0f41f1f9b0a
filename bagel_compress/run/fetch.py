"""Downloads published builds from the Hub and compares every byte with the manifest.

`fetch` downloads the files that are needed to open a published artifact or export into the client's cache and reads
each of them once, to compare its digest with the manifest's; the client itself compares only sizes. The commit is
resolved once, so that all files are of one version.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import MANIFESTS, FileEntry, listed_files
from bagel_compress.build.manifest_files import intact
from bagel_compress.errors import ArtifactError, HubError
from bagel_compress.io.atomic import write_atomic
from bagel_compress.io.hub_client import UnreachableError, download, listing, split_repo_id
from bagel_compress.io.safe_paths import exists

Kind = Literal["model", "everything"]
Files = Mapping[str, FileEntry]


def fetch(repo: str, revision: str | None = None, kind: Kind = "model") -> Path:
    """Downloads a published artifact or export (`owner/name`, or `owner/name@revision`) and returns its folder.

    With kind "model" these are the files needed to open it, with "everything" also card, reports and pictures. Files in
    the cache are not downloaded again. A file with a wrong digest is deleted and downloaded once more.
    Raises HubError if the Hub or the repository cannot be read, ArtifactError if it holds nothing (intact) of ours.
    """
    repo, revision = split_repo_id(repo, revision)
    try:
        commit, names = listing(repo, revision)
    except UnreachableError as error:
        return _cached(repo, revision, error)
    own = manifest_in(names)
    if own is None:
        raise ArtifactError(
            f"{repo} has no {' or '.join(MANIFESTS)}: it is no artifact of bagel-compress, or not a finished one."
        )
    manifest_path = download(repo, revision, [own])[own]  # by its name: the cache then knows the name
    if manifest_path.parent.name != commit:  # the repository changed between the two requests
        commit, names = listing(repo, manifest_path.parent.name)
    files = listed_files(own, manifest_path.read_bytes(), Path(repo))
    missing = files.keys() - names
    if missing:
        raise ArtifactError(
            f"{repo} lacks {min(missing)}, which its manifest names; its owner has to publish it again."
        )
    wanted = set(files) if kind == "model" else names - {".gitattributes"}
    download(repo, commit, sorted(wanted - {own}))
    folder = manifest_path.parent
    _check(repo, commit, folder, files)
    return folder


def fetch_model(repo: str) -> Path:
    """Downloads a repository's artifact, export (see `fetch`) or full-precision checkpoint; returns its folder.

    Raises HubError and ArtifactError as `fetch` does, CheckpointError if the repository has none of them.
    """
    from bagel_compress.source.checkpoint import locate

    name, revision = split_repo_id(repo)
    try:
        is_ours = manifest_in(listing(name, revision)[1]) is not None
    except UnreachableError:
        is_ours = _snapshot(name, revision) is not None
    return fetch(name, revision) if is_ours else locate(repo, weights=True)[0]


def manifest_in(names: Collection[str]) -> str | None:
    """The name of the manifest among these files; None if they are neither an artifact's nor an export's."""
    return next((manifest for manifest in MANIFESTS if manifest in names), None)


def open_artifact(path_or_repo: str | Path, revision: str | None = None) -> Artifact:
    """Opens an artifact in a folder or on the Hub. The digests of a downloaded one are all checked."""
    if exists(path_or_repo):
        return Artifact.open(path_or_repo)
    return Artifact.open(fetch(str(path_or_repo), revision))


def _check(repo: str, commit: str, folder: Path, files: Files) -> None:
    """Compares every file with its digest in the manifest; a wrong one is downloaded again, once."""
    for name in _wrong(folder, files, files):
        _forget(folder / name)
        download(repo, commit, [name])
        if _wrong(folder, files, [name]):
            _forget(folder / name)
            raise ArtifactError(
                f"{name} of {repo} is damaged: its digest is not the manifest's, twice; do not use it, tell its owner."
            )


def _wrong(folder: Path, files: Files, names: Iterable[str]) -> list[str]:
    """The files whose digests differ from the manifest. A file that was verified before and not modified is skipped."""
    notes = folder.parent.parent / f"verified-{folder.name}.json"
    known = _known(notes)
    stamps = {name: _stamp(folder / name, *files[name].digests.values()) for name in names}
    unread = [name for name, stamp in stamps.items() if known.get(name) != stamp]
    with ThreadPoolExecutor(4, "digest") as pool:
        whole = pool.map(lambda name: intact(folder / name, files[name]), unread)
        found = dict(zip(unread, whole, strict=True))
    if unread:
        kept = {name: stamp for name, stamp in stamps.items() if found.get(name, True)}
        write_atomic(notes, json.dumps({**known, **kept}).encode())
    return [name for name, good in found.items() if not good]


def _stamp(path: Path, digest: str) -> list[str | int]:
    status = path.stat()
    return [digest, status.st_size, status.st_mtime_ns]


def _known(notes: Path) -> dict[str, list[str | int]]:
    """The record of files of this snapshot that were verified before; empty if it cannot be read."""
    try:
        found = json.loads(notes.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _forget(path: Path) -> None:
    """Removes a file from the cache: the link in the snapshot and the blob that it points to."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _cached(repo: str, revision: str | None, cause: HubError) -> Path:
    """The folder of a complete and intact earlier download, for use when the Hub cannot be reached."""
    found = _snapshot(repo, revision)
    if found is None:
        raise cause from None
    folder, files = found
    if wrong := _wrong(folder, files, files):
        raise ArtifactError(f"{wrong[0]} of {repo} is damaged in the cache; connect to the network and run it again.")
    return folder


def _snapshot(repo: str, revision: str | None) -> tuple[Path, Files] | None:
    """The folder of a complete build in the cache and the files of its manifest; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        own = manifest_in({path.name for path in folder.iterdir()})
        files = {} if own is None else listed_files(own, (folder / own).read_bytes(), folder)
    except (LocalEntryNotFoundError, ArtifactError, OSError):
        return None
    complete = files and all((folder / n).is_file() and (folder / n).stat().st_size == files[n].bytes for n in files)
    return (folder, files) if complete else None
