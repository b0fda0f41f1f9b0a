"""Remote: what a repository shows at one commit, and how a release differs from it. Reads only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagel_compress.io.digests import sha256_file
from bagel_compress.io.hub_client import answered, download, failures
from bagel_compress.publishing.release import Release
from bagel_compress.run.fetch import manifest_in

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OWN = (".gitattributes",)  # files that the Hub itself puts into a repository


@dataclass(frozen=True)
class Remote:
    """What a repository shows at one commit: path -> digest ("sha256:..." for large files, "sha1:..." git blobs)."""

    commit: str
    private: bool
    files: Mapping[str, str]
    manifest: str | None  # sha256 of its manifest; None: it holds nothing of ours


def look(api: HfApi, repo: str, revision: str) -> Remote | None:
    """What the repository shows; None if it does not exist. A branch that does not exist yet shows what main does."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    with failures(f"{repo} cannot be read"):
        try:
            info = answered(lambda: api.model_info(repo, revision=revision))
        except RevisionNotFoundError:
            info = answered(lambda: api.model_info(repo))
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None
        files = listed_digests(api, repo, str(info.sha))
        manifest = None
        if (own := manifest_in(files)) is not None:
            local = download(repo, str(info.sha), [own])[own]
            manifest = sha256_file(local)
    return Remote(str(info.sha), bool(info.private), files, manifest)


def listed_digests(api: HfApi, repo: str, commit: str) -> dict[str, str]:
    """path -> digest of every file at a commit, as the Hub computed it when the file arrived; see `Remote.files`."""
    from huggingface_hub.hf_api import RepoFile

    tree = answered(lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit)))
    entries = [e for e in tree if isinstance(e, RepoFile)]
    return {e.path: f"sha256:{e.lfs.sha256}" if e.lfs else f"sha1:{e.blob_id}" for e in entries}


def differences(release: Release, held: Mapping[str, str]) -> dict[str, str]:
    """path -> "new", "changed", "same" or "only there", as an upload would find it."""
    result = {}
    for path in release.files:
        kind, _, there = held.get(path, "").partition(":")
        here = git_sha1(release.folder / path) if kind == "sha1" else release.files[path].sha256
        result[path] = "new" if path not in held else "same" if there == here else "changed"
    return result | {path: "only there" for path in held if path not in release.files and path not in OWN}


def holds(remote: Remote, release: Release) -> bool:
    """Whether every file of the release is there."""
    return all(state in ("same", "only there") for state in differences(release, remote.files).values())


def stale(remote: Remote, release: Release) -> list[str]:
    """Files of the build that is replaced."""
    return [path for path in sorted(remote.files) if path not in release.files and path not in OWN]


def git_sha1(path: Path) -> str:
    """The name that git gives to a file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
