"""The state of the local Hub: users, repositories, commits, large objects. No HTTP here; `hub.py` speaks that.

It keeps what the real Hub keeps as far as a client can see it: a commit is atomic, has a parent and a full file table;
small files are git blobs (sha1 identity), large ones are known by sha256 and must be uploaded before a commit may name
them. It has no history of renames, no permissions beyond owner, organisation and token role, and no Xet storage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

LFS_SUFFIXES = (".safetensors", ".onnx", ".data", ".bin", ".engine", ".sig")
LFS_BYTES = 10 << 20  # the Hub keeps files of more than 10 MB out of git


class RefusedError(Exception):
    """A request that the Hub answers with an error: HTTP status, X-Error-Code, message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class File:
    """One entry of a commit's file table. `oid` is the sha256 of a large file, the git sha1 of a small one."""

    oid: str
    size: int
    lfs: bool


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, File]


@dataclass
class User:
    """Who a token belongs to. `role` is the token's: read or write. `orgs` are those the user may write to."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()
    expired: bool = False


@dataclass
class Repo:
    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)

    def head(self, revision: str) -> Commit:
        """The commit a branch, pull request or commit id names."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def add(self, parent: str | None, title: str, files: dict[str, File]) -> Commit:
        table = json.dumps([parent, title, len(self.commits), sorted((p, f.oid) for p, f in files.items())])
        commit = Commit(hashlib.sha1(table.encode()).hexdigest(), parent, title, files)
        self.commits[commit.oid] = commit
        return commit


class Store:
    """All users, repositories and objects of one Hub."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}  # by token
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # by sha256 (large) or git sha1 (small)
        self.collections: dict[str, dict[str, Any]] = {}

    def user(self, token: str | None) -> User | None:
        if token is None:
            return None
        user = self.users.get(token)
        if user is None or user.expired:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return user

    def readable(self, name: str, user: User | None) -> Repo:
        """The repository, if it exists and the caller may know that."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and not self.owns(name, user)):
            raise RefusedError(404 if user else 401, "RepoNotFound", "Repository not found")
        return repo

    def writable(self, name: str, user: User | None, pull_request: bool = False) -> Repo:
        repo = self.readable(name, user)
        if user is None:
            raise RefusedError(401, "", "Invalid username or password.")
        if user.role != "write" or not (pull_request or self.owns(name, user)):
            raise RefusedError(403, "", f"Forbidden: pass a token with write access to {name}.")
        return repo

    @staticmethod
    def owns(name: str, user: User | None) -> bool:
        return user is not None and name.partition("/")[0] in (user.name, *user.orgs)

    def create(self, user: User | None, owner: str | None, name: str, private: bool) -> tuple[str, bool]:
        """The full name, and whether the repository is new."""
        if user is None:
            raise RefusedError(401, "", "Invalid username or password.")
        full = f"{owner or user.name}/{name}"
        if user.role != "write" or not self.owns(full, user):
            raise RefusedError(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}".')
        if full in self.repos:
            return full, False
        repo = self.repos[full] = Repo(full, private)
        attributes = self.keep(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", lfs=False)
        repo.refs["main"] = repo.add(None, "initial commit", {".gitattributes": attributes}).oid
        return full, True

    def keep(self, data: bytes, lfs: bool) -> File:
        oid = hashlib.sha256(data).hexdigest() if lfs else git_sha1(data)
        self.objects[oid] = data
        return File(oid, len(data), lfs)

    def commit(self, repo: Repo, revision: str, lines: Iterable[dict[str, Any]], pull_request: bool) -> Commit:
        """Applies the NDJSON operations as one commit on a branch, or on a new pull request."""
        if pull_request:
            base = repo.head(revision)
            revision = f"refs/pr/{len(repo.pulls) + 1}"
        else:
            base = repo.head(revision)
        files, title = dict(base.files), ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, base.oid):
                    raise RefusedError(412, "", "A commit has happened since. Please refresh and try again.")
            else:
                self._apply(files, key, value)
        commit = repo.add(base.oid, title, files)
        repo.refs[revision] = commit.oid
        if pull_request:
            repo.pulls.append(revision)
        return commit

    def _apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        import base64

        path = value["path"]
        if key == "file":
            files[path] = self.keep(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                raise RefusedError(400, "", f"LFS pointer pointed to a file that does not exist: {value['oid']}")
            files[path] = File(value["oid"], value["size"], lfs=True)
        elif key == "deletedFile":
            if path not in files:
                raise RefusedError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            del files[path]
        else:
            raise RefusedError(400, "", f"unknown operation {key}")

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        """What a repository shows; for tests."""
        return self.objects[self.repos[name].head(revision).files[path].oid]


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Which files the Hub keeps out of git: by name, by size, and anything binary."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_BYTES or b"\0" in sample)
