"""Reads the files of a Hub repository at one commit, and compares a release with them. Writes nothing."""

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

HUB_FILES = (".gitattributes",)  # files that the Hub itself puts into a repository


@dataclass(frozen=True)
class Remote:
    """A repository at one commit."""

    commit: str
    private: bool
    files: Mapping[str, str]  # path -> digest: "sha256:..." for large files (LFS), "sha1:..." for git blobs
    manifest: str | None  # sha256 of its manifest; None if it holds no build


def read_remote(api: HfApi, repo: str, revision: str) -> Remote | None:
    """The repository at a revision; None if it does not exist. A missing branch is read as main, its later parent."""
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
    """Path -> digest of every file at a commit (see `Remote.files`), computed by the Hub when the file arrived."""
    from huggingface_hub.hf_api import RepoFile

    tree = answered(lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit)))
    entries = [e for e in tree if isinstance(e, RepoFile)]
    return {e.path: f"sha256:{e.lfs.sha256}" if e.lfs else f"sha1:{e.blob_id}" for e in entries}


def differences(release: Release, held: Mapping[str, str]) -> dict[str, str]:
    """Path -> "new", "changed", "same" or "only there" (in the repository, whose files are `held`)."""
    result = {}
    for path in release.files:
        kind, _, remote = held.get(path, "").partition(":")
        local = git_sha1(release.folder / path) if kind == "sha1" else release.files[path].sha256
        result[path] = "new" if path not in held else "same" if remote == local else "changed"
    return result | {path: "only there" for path in held if path not in release.files and path not in HUB_FILES}


def has_release(remote: Remote, release: Release) -> bool:
    """Whether the repository has every file of the release."""
    return all(state in ("same", "only there") for state in differences(release, remote.files).values())


def obsolete_files(remote: Remote, release: Release) -> list[str]:
    """Files of the repository that the release does not have; they are deleted when a build is replaced."""
    return [path for path in sorted(remote.files) if path not in release.files and path not in HUB_FILES]


def git_sha1(path: Path) -> str:
    """The sha1 by which git names a blob with the file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
