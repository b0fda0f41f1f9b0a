"""The steps of `publish`, in order: checks, release folder, upload, verification on the Hub, receipts, collection."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from bagel_compress.errors import PublishError
from bagel_compress.io.atomic import write_atomic
from bagel_compress.io.hub_client import client, failures, offline, split_repo_id
from bagel_compress.publishing.card_sections import CARD, Origin
from bagel_compress.publishing.collection_table import (
    add_to_collection,
    card_with_table,
    collection_row,
    other_members,
    table_of,
)
from bagel_compress.publishing.provenance import ListedFile
from bagel_compress.publishing.publishable import Publishable, open_publishable, source_of
from bagel_compress.publishing.receipt import write_receipts
from bagel_compress.publishing.release import Release, make_release
from bagel_compress.publishing.remote_files import differences, read_remote
from bagel_compress.publishing.upload import Progress, Uploaded, upload


@dataclass(frozen=True)
class PublishRequest:
    """The user's request to publish a build."""

    build: Path  # folder of an artifact or export
    repo: str
    base_model: str | None = None
    license: str = "apache-2.0"
    folder: Path | None = None  # release folder; None: beside the build
    receipts: Path = Path("exports/receipts")
    revision: str = "main"
    private: bool = False
    draft: bool = False
    unrun: bool = False  # also publish an export that was never run in its own form; its card says so
    create_pr: bool = False
    replace: bool = False  # allow a repository with another build
    signing_key: Path | None = None
    collection: str = ""  # title of a collection to add the build to; empty: none


@dataclass(frozen=True)
class PublishResult:
    """The result of publishing."""

    release: Release
    uploaded: Uploaded
    receipts: tuple[Path, ...]
    cards: tuple[str, ...]  # repositories of the collection whose cards were updated


def publish(request: PublishRequest, progress: Progress | None = None) -> PublishResult:
    """Verifies a build, uploads it and checks the upload. Nothing is visible on the Hub before the final commit.

    Raises GateError if the build may not be published, PublishError, HubError or ArtifactError.
    """
    if request.collection and (request.draft or request.create_pr or request.revision != "main"):
        raise PublishError("a collection shows main; leave out --collection with a draft, pull request or revision.")
    release = prepare_release(request)
    own = collection_row(
        release.publishable, release.reports, request.repo, _origin(release.publishable, request).base_model
    )
    if request.collection:
        other_members(client(), request.collection, own)  # raises before anything is uploaded
    release = with_table(release, request.repo, request.revision)
    uploaded = upload(
        release,
        request.repo,
        revision=request.revision,
        create_pr=request.create_pr,
        private=request.private,
        replace=request.replace,
        progress=progress,
    )
    receipts = write_receipts(release, uploaded, request.receipts) if uploaded.pull_request is None else []
    cards: list[str] = []
    if request.collection:
        cards = add_to_collection(client(), request.collection, own)
    return PublishResult(release, uploaded, tuple(receipts), tuple(cards))


def prepare_release(request: PublishRequest) -> Release:
    """Writes the folder that is uploaded. Raises GateError if the build may not be published."""
    split_repo_id(request.repo)
    if "@" in request.repo:
        raise PublishError(f"{request.repo}: give the branch with --revision.")
    publishable = open_publishable(request.build)
    folder = request.folder or publishable.path.with_name(publishable.path.name + ".release")
    return make_release(
        publishable, folder, _origin(publishable, request), request.draft, request.signing_key, request.unrun
    )


def with_table(release: Release, repo: str, revision: str) -> Release:
    """The release, its card completed by the comparison table that the repository's present card has, if any."""
    api = client()
    remote = read_remote(api, repo, revision)
    if remote is None or CARD not in remote.files:
        return release
    with failures(f"the card of {repo} cannot be read"):
        published = Path(api.hf_hub_download(repo, CARD, revision=remote.commit)).read_text(encoding="utf-8")
    if not (text := table_of(published)):
        return release
    path = release.folder / CARD
    content = card_with_table(path.read_text(encoding="utf-8"), text).encode()
    write_atomic(path, content)
    entry = ListedFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return replace(release, files={**release.files, CARD: entry})


def preview(release: Release, repo: str, revision: str) -> str:
    """The changes that an upload would make in the repository, as text: a line per file, and a diff of the card."""
    if offline():
        files = [f"  {entry.bytes:>15,}  {path}" for path, entry in release.files.items()]
        return "\n".join([f"{repo}: not compared with its present files (HF_HUB_OFFLINE is set)", *files])
    release, api = with_table(release, repo, revision), client()
    remote = read_remote(api, repo, revision)
    marks = {"new": "+", "changed": "~", "same": "=", "only there": "?"}
    lines = [f"{repo}: " + ("does not exist yet" if remote is None else f"compared with {remote.commit[:12]}")]
    for path, state in differences(release, remote.files if remote else {}).items():
        size = f"{release.files[path].bytes:>15,}" if path in release.files else " " * 15
        lines.append(f"  {marks[state]} {size}  {path}")
    if remote is not None and CARD in remote.files:
        with failures(f"the card of {repo} cannot be read"):
            old = Path(api.hf_hub_download(repo, CARD, revision=remote.commit)).read_text(encoding="utf-8")
        new = (release.folder / CARD).read_text(encoding="utf-8")
        lines += difflib.unified_diff(old.splitlines(), new.splitlines(), "card there", "card here", lineterm="", n=1)
    return "\n".join(lines)


def _origin(publishable: Publishable, request: PublishRequest) -> Origin:
    return Origin.of(source_of(publishable), request.repo, request.base_model, request.license)
