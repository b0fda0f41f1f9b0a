"""Uploads a release folder as one commit, completely or not at all.

Large files are sent first, one by one, the largest first; the Hub stores them by digest without showing them. A single
commit then adds all files, with the commit that was read at the start as its parent, so that it fails if somebody else
wrote meanwhile. At every moment the branch therefore has either its old state or the complete release. An interrupted
run is simply repeated: contents that the Hub has are not sent again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from functools import partial
from typing import TYPE_CHECKING, Any

from bagel_compress.build.manifest import MANIFESTS
from bagel_compress.errors import GateError, PublishError
from bagel_compress.io.hub_client import TRIES, client, failures, insist, transient, transport_errors
from bagel_compress.publishing.release import Release
from bagel_compress.publishing.remote_files import (
    HUB_FILES,
    Remote,
    differences,
    has_release,
    listed_digests,
    obsolete_files,
    read_remote,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

LARGE = 1 << 20  # files of at least this many bytes are sent one by one, so that a retry repeats only one of them
Progress = Callable[[str, int, int], None]  # (file, bytes sent before it, bytes in all)


@dataclass(frozen=True)
class Uploaded:
    """The commit that a release was uploaded as."""

    repo: str
    commit: str
    url: str
    pull_request: str | None
    private: bool = False


def upload(
    release: Release,
    repo: str,
    *,
    revision: str = "main",
    create_pr: bool = False,
    private: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Uploaded:
    """Uploads the release to the repository and compares the digests of the uploaded files.

    `private` makes a new repository private; `replace` allows a repository with another build, whose files are deleted.
    Raises PublishError without the right to write, or if the repository has another build; HubError if the user is not
    logged in, the Hub refuses or cannot be reached; GateError if the folder changed since it was verified, or if the
    uploaded files differ from it.
    """
    api = client()
    remote = prepare(api, release, repo, revision, create_pr, private or release.draft, replace)
    additions = _additions(release)
    _send_large(api, release, repo, revision, create_pr, additions, progress or (lambda *_: None))
    removed = obsolete_files(remote, release) if replace else []
    uploaded = _commit(api, release, repo, revision, create_pr, remote, additions, removed)
    check_arrived(api, release, uploaded)
    return replace_fields(uploaded, private=remote.private)


def prepare(
    api: HfApi, release: Release, repo: str, revision: str, create_pr: bool, private: bool, replace: bool
) -> Remote:
    """Makes all checks that are possible before the upload, and creates the repository and the branch if needed.

    Raises PublishError, HubError.
    """
    may_write = _may_write(api, repo)
    remote = read_remote(api, repo, revision)
    if not may_write and (remote is None or not create_pr):
        raise PublishError(
            f"{repo} belongs to somebody else; publish under your own name or organisation"
            + (", or offer it with --create-pr." if remote is not None else ".")
        )
    if remote is None:
        if create_pr:
            raise PublishError(f"{repo} does not exist and cannot take a pull request; publish without --create-pr.")
        remote = _create(api, repo, revision, private)
    if release.draft and not (remote.private or create_pr):
        raise PublishError(f"{repo} is public, a draft is not; use --create-pr or a private repository.")
    _refuse_other_build(release, repo, remote, replace)
    if revision != "main" and not revision.startswith("refs/") and not create_pr:
        with failures(f"branch {revision} of {repo} cannot be made"):
            insist(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    return remote


def check_arrived(api: HfApi, release: Release, uploaded: Uploaded) -> None:
    """Compares the verified digests with those that the Hub lists. Raises GateError on any difference.

    The Hub computed its digests from the bytes that arrived, so large files need not be downloaded.
    """
    with failures(f"{uploaded.repo} cannot be checked after the upload"):
        found = listed_digests(api, uploaded.repo, uploaded.commit)
    texts = {"changed": "differs", "new": "is missing"}
    faults = [f"{path} {texts[state]}" for path, state in differences(release, found).items() if state in texts]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise GateError(
            f"{uploaded.repo} does not have the files that were sent: {faults[0]}{more}; run the same command again,"
            " and report it to the Hub if the error stays."
        )


def _may_write(api: HfApi, repo: str) -> bool:
    """Whether the user may write to the repository: its owner is the user or one of the user's organisations.

    Raises HubError without a token, PublishError if the token is read-only.
    """
    with failures("you cannot publish"):
        user = insist(api.whoami)
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PublishError("you cannot publish: your token may only read; create one with the right to write.")
    writable = {user["name"]} | {o["name"] for o in user.get("orgs", []) if o.get("roleInOrg") != "read"}
    return repo.partition("/")[0] in writable


def _create(api: HfApi, repo: str, revision: str, private: bool) -> Remote:
    with failures(f"{repo} cannot be created"):
        insist(lambda: api.create_repo(repo, private=private, exist_ok=True))
    remote = read_remote(api, repo, revision)
    if remote is None:
        raise PublishError(f"{repo} was created but cannot be seen; run the same command again.")
    return remote


def _refuse_other_build(release: Release, repo: str, remote: Remote, replace: bool) -> None:
    if replace or remote.manifest == release.publishable.digest:
        return
    if remote.manifest is not None:
        raise PublishError(
            f"{repo} already holds another build (manifest {remote.manifest[:12]}, this one is"
            f" {release.publishable.digest[:12]}); choose another name or --revision, or give --replace."
        )
    weights = [path for path in sorted(remote.files) if path not in (*HUB_FILES, "README.md", "LICENSE")]
    if weights:
        raise PublishError(
            f"{repo} already holds other files ({weights[0]}); choose another name or --revision, or give --replace."
        )


def _additions(release: Release) -> list[CommitOperationAdd]:
    """The operations that add the files, the largest first and the manifest last."""
    from huggingface_hub import CommitOperationAdd

    order = sorted(release.files, key=lambda path: (path in MANIFESTS, -release.files[path].bytes, path))
    return [CommitOperationAdd(path, str(release.folder / path)) for path in order]


def _send_large(
    api: HfApi,
    release: Release,
    repo: str,
    revision: str,
    create_pr: bool,
    additions: list[CommitOperationAdd],
    progress: Progress,
) -> None:
    """Sends the contents, large files one by one, the others together. Nothing is visible before the commit."""
    sent, total = 0, sum(entry.bytes for entry in release.files.values())
    large = [op for op in additions if release.files[op.path_in_repo].bytes >= LARGE]
    small = [op for op in additions if release.files[op.path_in_repo].bytes < LARGE]
    for group in [*([op] for op in large), small]:
        name = group[0].path_in_repo if len(group) == 1 else f"{len(group)} smaller files"
        progress(name, sent, total)
        for operation in group:
            _unchanged(release, operation)
        with failures(f"the upload of {name} to {repo} broke off"):
            insist(partial(_preupload, api, repo, group, revision, create_pr))
        sent += sum(release.files[op.path_in_repo].bytes for op in group)
    progress("", total, total)


def _preupload(api: HfApi, repo: str, group: list[CommitOperationAdd], revision: str, create_pr: bool) -> None:
    """Sends contents. huggingface_hub wraps an error with a file in a RuntimeError; its cause is raised instead."""
    try:
        api.preupload_lfs_files(repo, group, revision=revision, create_pr=create_pr, free_memory=False)
    except RuntimeError as error:
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise


def _unchanged(release: Release, operation: CommitOperationAdd) -> None:
    """Raises GateError if the file's digest is not the verified one; the client uploads it under the digest checked."""
    path = operation.path_in_repo
    if operation.upload_info.sha256.hex() != release.files[path].sha256:
        raise GateError(f"{path} was changed after it had been verified; run the same command again.")


def _commit(
    api: HfApi,
    release: Release,
    repo: str,
    revision: str,
    create_pr: bool,
    remote: Remote,
    additions: list[CommitOperationAdd],
    removed: list[str],
) -> Uploaded:
    """Makes the commit. If the Hub's answer is lost, the repository is read before the commit is tried again."""
    from huggingface_hub import CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    uncertain: tuple[type[Exception], ...] = (HfHubHTTPError, *transport_errors())
    if create_pr and (pull := _open_pull_request(api, release, repo)):
        return pull
    operations: list[Any] = [*(CommitOperationDelete(path, is_folder=False) for path in removed), *additions]
    for attempt in range(TRIES):
        with failures(f"the commit to {repo} failed"):
            try:
                info = api.create_commit(
                    repo,
                    operations,
                    commit_message=release.title,
                    revision=revision,
                    parent_commit=None if create_pr else remote.commit,
                    create_pr=create_pr,
                )
            except uncertain as error:
                arrived = _arrived(api, release, repo, revision, create_pr)
                if arrived is not None:
                    return arrived
                if not transient(error) or attempt == TRIES - 1:
                    raise
            else:
                return Uploaded(repo, info.oid, info.commit_url, info.pr_url)
    raise AssertionError("unreachable")


def _arrived(api: HfApi, release: Release, repo: str, revision: str, create_pr: bool) -> Uploaded | None:
    """The uploaded release, if a commit whose answer was lost was made after all; else None."""
    if create_pr:
        return _open_pull_request(api, release, repo)
    found = read_remote(api, repo, revision)
    if found is None or not has_release(found, release):
        return None
    return Uploaded(repo, found.commit, f"{api.endpoint}/{repo}/commit/{found.commit}", None)


def _open_pull_request(api: HfApi, release: Release, repo: str) -> Uploaded | None:
    """An existing pull request with exactly this release, so that a repeated command opens no second one; else None."""
    with failures(f"the pull requests of {repo} cannot be read"):
        pulls = api.list_repo_refs(repo, include_pull_requests=True).pull_requests or []
        for pull in pulls:
            found = read_remote(api, repo, pull.ref)
            if found is not None and has_release(found, release):
                number = pull.ref.rpartition("/")[2]
                return Uploaded(repo, found.commit, f"{api.endpoint}/{repo}/commit/{found.commit}",
                                f"{api.endpoint}/{repo}/discussions/{number}")  # fmt: skip
    return None
