"""The Hub as this program uses it: one client, one sentence per failure, downloads whose every byte is checked.

`fetch` brings what is needed to open a published artifact or export into the client's cache and reads each file once,
to compare it with the manifest: the client itself compares sizes only. The commit is resolved once, so that all files
are of one version.

Tokens are found by huggingface_hub (HF_TOKEN, or what `hf auth login` stored) and are never read, printed or kept here;
messages that come from elsewhere are scrubbed of anything that looks like one.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from bagel_compress.build.artifact import MANIFESTS, Artifact, FileEntry, intact, listed_files
from bagel_compress.errors import ArtifactError, PublishError
from bagel_compress.io.atomic import write_atomic
from bagel_compress.source.checkpoint_download import first_line, transport_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
SECRET = re.compile(r"hf_\w{8,}|(?<=[Bb]earer )\S+|(?<=://)[^/@\s]+(?=@)")  # tokens, and logins in an address
Kind = Literal["model", "everything"]
TRIES = 3  # of a request that may be repeated
PAUSE = 1.0  # seconds before the second try, doubled before the third
T = TypeVar("T")
Files = Mapping[str, FileEntry]


def fetch(repo: str, revision: str | None = None, kind: Kind = "model") -> Path:
    """Downloads a published artifact or export (`owner/name`, or `owner/name@revision`) and returns its folder.

    kind "model": what is needed to open it; "everything": card, reports and pictures too. What is already in the cache
    is not loaded again. A file that is not what the manifest says is removed and loaded once more.
    Raises PublishError if the Hub or the repository cannot be read, ArtifactError if it holds nothing (intact) of ours.
    """
    repo, revision = split_revision(repo, revision)
    try:
        commit, names = listing(repo, revision)
    except _UnreachableError as error:
        return _cached(repo, revision, error)
    own = manifest_in(names)
    if own is None:
        raise ArtifactError(
            f"{repo} has no {' or '.join(MANIFESTS)}: it is no artifact of bagel-compress, or not a finished one."
        )
    manifest_path = _get(repo, revision or "main", [own])[own]  # by its name: the cache then knows the name
    if manifest_path.parent.name != commit:  # somebody published in this moment
        commit, names = listing(repo, manifest_path.parent.name)
    files = listed_files(own, manifest_path.read_bytes(), Path(repo))
    missing = files.keys() - names
    if missing:
        raise ArtifactError(
            f"{repo} lacks {min(missing)}, which its manifest names; its owner has to publish it again."
        )
    wanted = set(files) if kind == "model" else names - {".gitattributes"}
    _get(repo, commit, sorted(wanted - {own}))
    folder = manifest_path.parent
    _check(repo, commit, folder, files)
    return folder


def fetch_model(repo: str) -> Path:
    """The folder of whatever a repository holds: artifact or export (see `fetch`), else a full-precision checkpoint.

    Raises what `fetch` raises, and CheckpointError if it is none of them.
    """
    from bagel_compress.source.checkpoint import locate

    name, revision = split_revision(repo)
    try:
        is_ours = manifest_in(listing(name, revision)[1]) is not None
    except _UnreachableError:
        is_ours = _snapshot(name, revision) is not None
    return fetch(name, revision) if is_ours else locate(repo, weights=True)[0]


def manifest_in(names: Collection[str]) -> str | None:
    """The manifest among the files of a folder or repository; None: it holds nothing of ours."""
    return next((manifest for manifest in MANIFESTS if manifest in names), None)


def open_artifact(path_or_repo: str | Path, revision: str | None = None) -> Artifact:
    """An artifact from a folder or from the Hub; one from the Hub has every digest checked."""
    if Path(path_or_repo).exists():
        return Artifact.open(path_or_repo)
    return Artifact.open(fetch(str(path_or_repo), revision))


def split_revision(repo: str, revision: str | None = None) -> tuple[str, str | None]:
    """`owner/name@revision` -> both. Raises PublishError on anything else."""
    name, _, at = repo.partition("@")
    if not REPO_ID.fullmatch(name) or ".." in name or name.startswith("."):
        raise PublishError(f"{repo} is neither a folder here nor the name of a repository (owner/name).")
    return name, revision or at or None


def client() -> HfApi:
    """The client, with this program's name in its requests."""
    from importlib.metadata import version

    from huggingface_hub import HfApi

    return HfApi(library_name="bagel-compress", library_version=version("bagel-compress"))


def listing(repo: str, revision: str | None) -> tuple[str, set[str]]:
    """The commit that a revision means now, and the files in it."""
    with failures(f"{repo} cannot be read"):
        info = insist(lambda: client().model_info(repo, revision=revision))
    return str(info.sha), {sibling.rfilename for sibling in info.siblings or ()}


class _UnreachableError(PublishError):
    """No answer at all: the network, or the server, is down."""


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Turns what the client raises into one PublishError, "<what>: <reason>; <what to do>.", free of secrets."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    silent: tuple[type[Exception], ...] = (OfflineModeIsEnabled, LocalEntryNotFoundError, *transport_errors())
    try:
        yield
    except GatedRepoError:
        raise PublishError(f"{what}: it is gated; accept its terms on its page and log in.") from None
    except RepositoryNotFoundError:
        raise PublishError(
            f"{what}: there is no such repository, or your token may not see it; check its name, or log in."
        ) from None
    except HfHubHTTPError as error:
        raise PublishError(f"{what}: {_status(error)}.") from None
    except LocalTokenNotFoundError:
        raise PublishError(f"{what}: you are not logged in; run `hf auth login` or set HF_TOKEN.") from None
    except silent as error:
        raise _UnreachableError(
            f"{what}: the Hub cannot be reached ({scrubbed(first_line(error))}); run the same command again later."
        ) from None
    except (HFValidationError, ValueError) as error:
        raise PublishError(f"{what}: {scrubbed(' '.join(str(error).split()))}") from None


def insist(call: Callable[[], T]) -> T:
    """The result of a request that may be repeated; tried again, after a pause, while trying again can help.

    The client repeats some of its requests itself, which ones depends on its version.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    passing: tuple[type[Exception], ...] = (HfHubHTTPError, LocalEntryNotFoundError, *transport_errors())
    for attempt in range(TRIES - 1):
        try:
            return call()
        except passing as error:
            if not transient(error):
                raise
            time.sleep(PAUSE * 2**attempt)
    return call()


def transient(error: BaseException) -> bool:
    """Whether trying again can help: no answer, or one of the server's own faults."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code is None or code >= 500 or code == 429


def scrubbed(text: str) -> str:
    """The text without anything that could be a token."""
    return SECRET.sub("***", text)


def _status(error: Exception) -> str:
    """What an HTTP error means for the user."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    known = {
        401: "the token is invalid or has expired; run `hf auth login` again",
        403: "the token may not do that; create one with write access to this repository",
        404: "the Hub does not know this revision or file",
        409: "it changed in this moment; run the same command again",
        412: "somebody else changed it since the upload began; look at what is there and run the same command again",
        429: "the Hub asks for a pause (429); run the same command later, it goes on from there",
    }
    if code in known:
        return known[code]
    if code is not None and code >= 500:
        return f"the Hub answered {code} and kept doing so; run the same command again later, it goes on from there"
    return scrubbed(first_line(error))


def _get(repo: str, revision: str, names: Iterable[str]) -> dict[str, Path]:
    """Files of one revision, from the cache or the Hub, by name."""
    from huggingface_hub import hf_hub_download

    def one(name: str) -> tuple[str, Path]:
        return name, Path(insist(lambda: hf_hub_download(repo, name, revision=revision)))

    with failures(f"the download of {repo} broke off"), ThreadPoolExecutor(4, "download") as pool:
        return dict(pool.map(one, names))


def _check(repo: str, commit: str, folder: Path, files: Files) -> None:
    """Reads every file of the manifest; a wrong one is loaded again, once."""
    for name in _wrong(folder, files, files):
        _forget(folder / name)
        _get(repo, commit, [name])
        if _wrong(folder, files, [name]):
            _forget(folder / name)
            raise ArtifactError(
                f"{name} of {repo} is damaged: its digest is not the manifest's, twice; do not use it, tell its owner."
            )


def _wrong(folder: Path, files: Files, names: Iterable[str]) -> list[str]:
    """Files that are not what the manifest says. One that was read before and not touched since is not read again."""
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
    """What was verified in this snapshot before; anything unreadable counts as nothing."""
    try:
        found = json.loads(notes.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _forget(path: Path) -> None:
    """Removes a file from the cache: the link in the snapshot and the blob that it points to."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _cached(repo: str, revision: str | None, cause: PublishError) -> Path:
    """What an earlier download left, complete and intact; used when the Hub cannot be reached."""
    found = _snapshot(repo, revision)
    if found is None:
        raise cause from None
    folder, files = found
    if wrong := _wrong(folder, files, files):
        raise ArtifactError(f"{wrong[0]} of {repo} is damaged in the cache; connect to the network and run it again.")
    return folder


def _snapshot(repo: str, revision: str | None) -> tuple[Path, Files] | None:
    """The folder of what is complete in the cache, and its files, if there is such a thing."""
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
