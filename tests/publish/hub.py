"""A Hub on localhost, for tests: the endpoints that the real `huggingface_hub` client calls when it creates, uploads,
commits, lists, downloads and verifies, with faults on demand.

    with Hub() as hub:
        hub.store.users["hf_token"] = User("ann")
        api = HfApi(endpoint=hub.url, token="hf_token")

`faults` are matched in order against "METHOD /path"; each is used up after `times` requests. `on_request(k, line)` is
called before request number k is served and `on_reply(k, line)` after it was served but before the answer is sent:
from there a test kills the client at any request. `altered` may change what is answered to "METHOD /path". The action
"drip" of a fault sends the body a byte at a time.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_store import File, RefusedError, Store, User, is_large

__all__ = ["Fault", "Hub", "User"]

TREE_PAGE = 20  # entries of one page of a tree listing; small, so that paging is exercised
PIPELINES = {"any-to-any", "text-to-image", "image-text-to-text"}


Answer = tuple[int, bytes, dict[str, str]]  # status, body, headers


@dataclass
class Fault:
    """What goes wrong at the next `times` requests whose line "METHOD /path?query" matches.

    action: status (answer with `status`), cut (drop the connection half-way), slow (wait `seconds` first),
    flip (change one byte of the body that is served), drip (a byte of it every `seconds`).
    """

    match: str
    action: str = "status"
    times: int = 1
    status: int = 503
    seconds: float = 0.2


class Hub:
    """The server; a context manager. `requests` logs every line that arrived."""

    def __init__(self) -> None:
        self.store = Store()
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.on_request: Callable[[int, str], None] = lambda k, line: None
        self.on_reply: Callable[[int, str], None] = lambda k, line: None
        self.altered: Callable[[str, Answer], Answer] = lambda line, answer: answer
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the client went away: on purpose
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        line = f"{self.command} {self.path}"
        with self.hub.lock:
            self.hub.requests.append(line)
            number = len(self.hub.requests)
        self.hub.on_request(number, line)
        self.line, self.number, self.fault = line, number, self.hub.take_fault(line)
        if self.fault and self.fault.action == "slow":
            time.sleep(self.fault.seconds)
        if self.fault and self.fault.action == "cut" and self.command in ("PUT", "POST"):
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._cut()
        body = self._body()
        if self.fault and self.fault.action == "status":
            return self._send(self.fault.status, b'{"error":"injected"}')
        try:
            with self.hub.lock:
                answer = self._answer(body)
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            return self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)
        status, data, headers = answer
        self._send(status, data if isinstance(data, bytes) else json.dumps(data).encode(), headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_PATCH = _serve  # noqa: N815

    def _answer(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        parts = urlsplit(self.path)
        self.path_only, self.query = unquote(parts.path), {k: v[0] for k, v in parse_qs(parts.query).items()}
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        user = None if self.path_only.startswith(("/lfs/", "/cdn/")) else self.hub.store.user(token)
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, self.path_only)
            if match and self.command in method:
                result = handler(self, user, body, **match.groupdict())
                return result if isinstance(result, tuple) else (200, result, {})
        raise RefusedError(404, "", f"no such endpoint: {self.line}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.hub.on_reply(self.number, self.line)
        status, data, headers = self.hub.altered(self.line, (status, data, headers or {}))
        if self.fault and self.fault.action == "flip" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.action == "drip":
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(self.fault.seconds)
            return
        if self.fault and self.fault.action == "cut":
            self.wfile.write(data[: len(data) // 2])
            return self._cut()
        self.wfile.write(data)

    def _cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    # -- endpoints: each takes the user, the body and what its path names --------------------------------------------

    def whoami(self, user: User | None, body: bytes) -> Any:
        if user is None:
            raise RefusedError(401, "", "Invalid username or password.")
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in user.orgs]
        token = {"displayName": "test", "role": user.role}
        return {"type": "user", "name": user.name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}

    def create(self, user: User | None, body: bytes) -> Any:
        want = json.loads(body)
        private = want.get("visibility") == "private" or bool(want.get("private"))
        name, new = self.hub.store.create(user, want.get("organization"), want["name"], private)
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        return (200, answer, {}) if new else (409, answer | {"error": "You already created this model repo"}, {})

    def delete(self, user: User | None, body: bytes) -> Any:
        want = json.loads(body)
        owner = want.get("organization") or (user.name if user else "")
        del self.hub.store.repos[self.hub.store.writable(f"{owner}/{want['name']}", user).name]
        return {}

    def validate_yaml(self, user: User | None, body: bytes) -> Any:
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.S)
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            data = str(error)
        errors = _card_errors(data)
        return (400 if errors else 200), {"errors": [{"message": e} for e in errors], "warnings": []}, {}

    def auth_check(self, user: User | None, body: bytes, repo: str, write: str | None) -> Any:
        (self.hub.store.writable if write else self.hub.store.readable)(repo, user)
        return {}

    def preupload(self, user: User | None, body: bytes, repo: str, rev: str) -> Any:
        here = self.hub.store.writable(repo, user, "create_pr" in self.query)
        files, answer = here.head(rev).files, []
        for want in json.loads(body)["files"]:
            large = is_large(want["path"], want["size"], base64.b64decode(want["sample"]))
            held = files.get(want["path"])
            oid = held.oid if held else None
            mode = "lfs" if large else "regular"
            answer.append({"path": want["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer, "commitOid": here.head(rev).oid}

    def lfs_batch(self, user: User | None, body: bytes, repo: str) -> Any:
        self.hub.store.writable(repo, user, pull_request=True)
        objects = []
        for want in json.loads(body)["objects"]:
            entry = {"oid": want["oid"], "size": want["size"]}
            if want["oid"] not in self.hub.store.objects:
                verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{want['oid']}"}, "verify": verify}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, user: User | None, body: bytes, oid: str) -> Any:
        import hashlib

        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "", "The Content-SHA256 you specified did not match what we received.")
        self.hub.store.objects[oid] = body
        return b""

    def lfs_verify(self, user: User | None, body: bytes, repo: str) -> Any:
        want = json.loads(body)
        if len(self.hub.store.objects.get(want["oid"], b"")) != want["size"]:
            raise RefusedError(404, "", "the object was not uploaded")
        return {}

    def commit(self, user: User | None, body: bytes, repo: str, rev: str) -> Any:
        pull = self.query.get("create_pr") == "1"
        here = self.hub.store.writable(repo, user, pull)
        commit = self.hub.store.commit(here, rev, (json.loads(line) for line in body.splitlines()), pull)
        url = f"{self.hub.url}/{repo}/discussions/{len(here.pulls)}" if pull else ""
        return {"commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit.oid}",
                "pullRequestUrl": url}  # fmt: skip

    def info(self, user: User | None, body: bytes, repo: str, rev: str | None) -> Any:
        here = self.hub.store.readable(repo, user)
        head = here.head(rev or "main")
        siblings = [{"rfilename": path} for path in sorted(head.files)]
        return {"_id": repo, "id": repo, "modelId": repo, "sha": head.oid, "private": here.private, "tags": [],
                "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip

    def settings(self, user: User | None, body: bytes, repo: str) -> Any:
        want = json.loads(body)
        self.hub.store.writable(repo, user).private = want.get("visibility") == "private" or bool(want.get("private"))
        return {}

    def branch(self, user: User | None, body: bytes, repo: str, name: str) -> Any:
        here = self.hub.store.writable(repo, user)
        if name in here.refs:
            raise RefusedError(409, "", f"Reference already exists: {name}")
        here.refs[name] = here.head((json.loads(body) if body else {}).get("startingPoint", "main")).oid
        return {}

    def refs(self, user: User | None, body: bytes, repo: str) -> Any:
        here = self.hub.store.readable(repo, user)
        rows = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in here.refs.items() if "/" not in n
        ]
        pulls = [{"name": n, "ref": n, "targetCommit": here.refs[n]} for n in here.pulls]
        return {"branches": rows, "converts": [], "tags": [], "pullRequests": pulls}

    def tree(self, user: User | None, body: bytes, repo: str, rev: str) -> Any:
        files = sorted(self.hub.store.readable(repo, user).head(rev).files.items())
        start = int(self.query.get("cursor", "0"))
        page = [_entry(path, file) for path, file in files[start : start + TREE_PAGE]]
        if start + TREE_PAGE >= len(files):
            return 200, page, {}
        more = f"{self.hub.url}{self.path_only}?recursive=true&cursor={start + TREE_PAGE}"
        return 200, page, {"Link": f'<{more}>; rel="next"'}

    def paths(self, user: User | None, body: bytes, repo: str, rev: str) -> Any:
        files = self.hub.store.readable(repo, user).head(rev).files
        asked = parse_qs(body.decode()).get("paths", []) if b"=" in body[:6] else json.loads(body)["paths"]
        return [_entry(path, files[path]) for path in asked if path in files]

    def resolve(self, user: User | None, body: bytes, repo: str, rev: str, path: str) -> Any:
        here = self.hub.store.readable(repo, user)
        head = here.head(rev)
        if path not in head.files:
            raise RefusedError(404, "EntryNotFound", f"Entry not found: {path}")
        file = head.files[path]
        headers = {"X-Repo-Commit": head.oid, "Accept-Ranges": "bytes", "ETag": f'"{file.oid}"'}
        if not file.lfs:
            return self._ranged(self.hub.store.objects[file.oid], headers)
        linked = {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.oid}"'}
        cdn = self.hub.url.replace("127.0.0.1", "localhost")  # another host, as the real one: no token is sent there
        return 302, b"", headers | linked | {"Location": f"{cdn}/cdn/{file.oid}"}

    def cdn(self, user: User | None, body: bytes, oid: str) -> Any:
        if "Authorization" in self.headers:
            raise RefusedError(400, "", "a token was sent to the content host")
        return self._ranged(self.hub.store.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, data: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        headers["Content-Type"] = "application/octet-stream"
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 200, data, headers
        start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
        return 206, data[start:stop], headers

    def collection_new(self, user: User | None, body: bytes) -> Any:
        want = json.loads(body)
        if user is None or want["namespace"] not in (user.name, *user.orgs):
            raise RefusedError(403, "", "Forbidden")
        slug = f"{want['namespace']}/{re.sub(r'[^a-z0-9]+', '-', want['title'].lower())}-0123456789abcdef01234567"
        held = self.hub.store.collections
        if slug in held:
            return 409, {"slug": slug}, {}
        held[slug] = {"slug": slug, "title": want["title"], "owner": {"name": want["namespace"]}, "items": [],
                      "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0,
                      "private": want["private"], "description": want.get("description")}  # fmt: skip
        return held[slug]

    def collection(self, user: User | None, body: bytes, slug: str) -> Any:
        if slug not in self.hub.store.collections:
            raise RefusedError(404, "", "Collection not found")
        return self.hub.store.collections[slug]

    def collection_add(self, user: User | None, body: bytes, slug: str) -> Any:
        want, held = json.loads(body)["item"], self.hub.store.collections[slug]
        if any(item["id"] == want["id"] for item in held["items"]):
            return 409, {"error": "already there"}, {}
        position = len(held["items"])
        held["items"].append({"_id": str(position), "id": want["id"], "type": want["type"], "position": position})
        return held


REPO, REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>.+)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("DELETE", r"/api/repos/delete", _Handler.delete),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", r"/api/collections", _Handler.collection_new),
    ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", _Handler.collection_add),
    ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", _Handler.collection),
    ("GET", rf"/api/models/{REPO}/auth-check(?P<write>/write)?", _Handler.auth_check),
    ("POST", rf"/api/models/{REPO}/preupload/{REV}", _Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REV}", _Handler.commit),
    ("POST", rf"/api/models/{REPO}/branch/(?P<name>.+)", _Handler.branch),
    ("GET", rf"/api/models/{REPO}/refs", _Handler.refs),
    ("GET", rf"/api/models/{REPO}/tree/{REV}", _Handler.tree),
    ("POST", rf"/api/models/{REPO}/paths-info/{REV}", _Handler.paths),
    ("PUT", rf"/api/models/{REPO}/settings", _Handler.settings),
    ("GET", rf"/api/models/{REPO}(?:/revision/{REV})?", _Handler.info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", _Handler.lfs_verify),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_put),
    ("GET HEAD", r"/cdn/(?P<oid>\w+)", _Handler.cdn),
    ("GET HEAD", rf"/{REPO}/resolve/(?P<rev>refs/pr/\d+|[^/]+)/(?P<path>.+)", _Handler.resolve),
]


def _entry(path: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.lfs:
        entry["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 130}
        entry["oid"] = "0" * 40  # the sha1 of the pointer file, which nobody compares
    return entry


def _card_errors(data: Any) -> list[str]:
    """What the real Hub says about a card's front matter, as far as our cards could be wrong."""
    if not isinstance(data, dict):
        return [f"the metadata is not a mapping: {data}"]
    errors = []
    if "license" in data and not re.fullmatch(r"[a-z0-9.-]+", str(data["license"])):
        errors.append('"license" must be one of the known licences')
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
            errors.append(f'"base_model" must be a model id, not {base!r}')
    if data.get("pipeline_tag", "any-to-any") not in PIPELINES:
        errors.append('"pipeline_tag" is unknown')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    return errors
