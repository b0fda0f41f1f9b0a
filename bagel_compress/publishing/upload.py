"""upload: a release folder becomes one commit of a repository, whole or not at all.

Large files are sent first, one by one and biggest first; the Hub keeps them by digest without showing them. Then a
single commit names everything, the manifest last, on top of the very commit that was looked at in the beginning. So
main is at every moment what it was, or complete, and a run that died is repeated: what the Hub has is not sent again.

It does not create history to be cleaned up later, and does not touch files of a repository that are not of a build.
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
from bagel_compress.publishing.remote_files import OWN, Remote, differences, holds, listed_digests, look, stale

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

LARGE = 1 << 20  # bytes from which a file is sent on its own, so that what has arrived is never sent twice
Progress = Callable[[str, int, int], None]  # file, bytes sent before it, bytes in all


@dataclass(frozen=True)
class Uploaded:
    """Where a release lies now."""

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
    """Puts the release into the repository and checks what arrived.

    `private` makes a new repository private; `replace` allows a repository that holds another build (its files go).
    Raises PublishError: no right to write, or another build is there; HubError: not logged in, refused, no network;
    GateError: the folder changed since it was verified, or what arrived is not what was sent.
    """
    api = client()
    remote = prepare(api, release, repo, revision, create_pr, private or release.draft, replace)
    additions = _additions(release)
    _send_large(api, release, repo, revision, create_pr, additions, progress or (lambda *_: None))
    removed = stale(remote, release) if replace else []
    uploaded = _commit(api, release, repo, revision, create_pr, remote, additions, removed)
    check_arrived(api, release, uploaded)
    return replace_fields(uploaded, private=remote.private)


def prepare(
    api: HfApi, release: Release, repo: str, revision: str, create_pr: bool, private: bool, replace: bool
) -> Remote:
    """Everything that can be refused before a byte is sent; creates the repository and the branch where needed."""
    may_write = _may_write(api, repo)
    remote = look(api, repo, revision)
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
    """Compares the digests of what was verified with those the Hub lists. Raises GateError on any difference.

    The Hub computed its digests itself when the files arrived, so large files are not read here again.
    """
    with failures(f"{uploaded.repo} cannot be checked after the upload"):
        found = listed_digests(api, uploaded.repo, uploaded.commit)
    words = {"changed": "differs", "new": "is missing"}
    faults = [f"{path} {words[state]}" for path, state in differences(release, found).items() if state in words]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise GateError(
            f"{uploaded.repo} does not hold what was sent: {faults[0]}{more}; run the same command again and, if it"
            " stays so, tell the Hub."
        )


def _may_write(api: HfApi, repo: str) -> bool:
    """Whether the repository's owner is the user or an organisation of theirs. Raises HubError without a token."""
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
    remote = look(api, repo, revision)
    if remote is None:
        raise PublishError(f"{repo} was created but cannot be seen; run the same command again.")
    return remote


def _refuse_other_build(release: Release, repo: str, remote: Remote, replace: bool) -> None:
    if replace or remote.manifest == release.publishable.digest:
        return
    if remote.manifest is not None:
        raise PublishError(
            f"{repo} already holds another build (manifest {remote.manifest[:12]}, this one is"
            f" {release.publishable.digest[:12]}); choose another name or --revision, or say --replace."
        )
    weights = [path for path in sorted(remote.files) if path not in (*OWN, "README.md", "LICENSE")]
    if weights:
        raise PublishError(
            f"{repo} already holds other files ({weights[0]}); choose another name or --revision, or say --replace."
        )


def _additions(release: Release) -> list[CommitOperationAdd]:
    """Biggest first, the manifest last. Raises GateError if a file is no longer what was verified."""
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
    """Sends contents, large files one by one, the rest together; nothing of it shows before the commit."""
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
    """Sends contents. The client wraps what goes wrong with a file in a RuntimeError; the cause says more."""
    try:
        api.preupload_lfs_files(repo, group, revision=revision, create_pr=create_pr, free_memory=False)
    except RuntimeError as error:
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise


def _unchanged(release: Release, operation: CommitOperationAdd) -> None:
    """Reads the file and compares it with what was verified; the client then sends under this very digest."""
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
    """One commit. An answer that got lost is not an error: the repository is looked at, and only then tried again."""
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
    """The release as it lies in the repository, if a commit whose answer was lost went through."""
    if create_pr:
        return _open_pull_request(api, release, repo)
    found = look(api, repo, revision)
    if found is None or not holds(found, release):
        return None
    return Uploaded(repo, found.commit, f"{api.endpoint}/{repo}/commit/{found.commit}", None)


def _open_pull_request(api: HfApi, release: Release, repo: str) -> Uploaded | None:
    """A pull request that already offers exactly this release: a repeated command makes no second one."""
    with failures(f"the pull requests of {repo} cannot be read"):
        pulls = api.list_repo_refs(repo, include_pull_requests=True).pull_requests or []
        for pull in pulls:
            found = look(api, repo, pull.ref)
            if found is not None and holds(found, release):
                number = pull.ref.rpartition("/")[2]
                return Uploaded(repo, found.commit, f"{api.endpoint}/{repo}/commit/{found.commit}",
                                f"{api.endpoint}/{repo}/discussions/{number}")  # fmt: skip
    return None
