"""Uploads: whole or not at all, through faults, through death at any request, and never against the owner's will."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import Fault, Hub, User
from interrupts import calls_of, moments, sigint_at
from publish_data import BASE, REPO, TOKEN, flip

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.errors import GateError, HubError, PublishError
from bagel_compress.publishing.card_sections import Origin
from bagel_compress.publishing.release import Release, make_release
from bagel_compress.publishing.upload import upload
from bagel_compress.publishing.verify import verify_repo


@pytest.fixture
def release(artifact: Artifact, tmp_path: Path) -> Release:
    return make_release(artifact, tmp_path / "release", Origin(REPO, BASE))


class Killed(BaseException):
    """The client's process is gone: nothing after this runs."""


class Killer:
    """Lets `alive` requests of the client through and kills it at the next: before it is sent or after the answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub.utils import get_session

        self.alive, self.answered, self.seen = 10**9, False, 0
        real = type(get_session()).send

        def send(client: object, request: object, **options: object) -> object:
            self.seen += 1
            if self.seen > self.alive and not self.answered:
                raise Killed
            response = real(client, request, **options)
            if self.seen > self.alive:
                raise Killed
            return response

        monkeypatch.setattr(type(get_session()), "send", send)

    def arm(self, alive: int, answered: bool) -> None:
        self.alive, self.answered, self.seen = alive, answered, 0


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    return Killer(monkeypatch)


def whole(hub: Hub, revision: str = "main") -> bool:
    """True if the branch shows the whole build, False if it shows none of it. Anything else is what must not be."""
    repo = hub.store.repos.get(REPO)
    if repo is None or MANIFEST not in repo.head(revision).files:
        shown = [] if repo is None else list(repo.head(revision).files)
        assert set(shown) <= {".gitattributes"}, shown
        return False
    manifest = json.loads(hub.store.read(REPO, MANIFEST, revision))
    for name in manifest["files"]:
        assert hub.store.read(REPO, name, revision), name
    return True


def test_one_commit_brings_everything(hub: Hub, release: Release) -> None:
    done = upload(release, REPO)
    assert whole(hub)
    assert [c.title for c in hub.store.repos[REPO].commits.values()] == ["initial commit", release.title]
    assert hub.store.repos[REPO].refs["main"] == done.commit
    for path in release.files:
        assert hub.store.read(REPO, path) == (release.folder / path).read_bytes()


def test_faults_on_the_way_are_survived(hub: Hub, release: Release) -> None:
    hub.faults = [
        Fault("PUT /lfs/", times=2),
        Fault("PUT /lfs/", "cut"),
        Fault("POST .*/commit/", times=1),
        Fault("GET .*/tree/", times=1),
        Fault("GET /api/whoami", times=1),
        Fault("POST /api/repos/create", "cut"),
        Fault("GET /api/models/[^/]+/[^/]+/revision/", times=2),
        Fault("POST .*/objects/batch", "slow"),
    ]
    upload(release, REPO)
    assert whole(hub)
    assert all(fault.times == 0 for fault in hub.faults)


def test_a_lost_answer_to_the_commit_makes_no_second_commit(hub: Hub, release: Release) -> None:
    gone: list[str] = []

    def lose(number: int, line: str) -> None:
        if "/commit/" in line and not gone:
            gone.append(line)
            raise ConnectionAbortedError  # after the commit was made, before its answer is sent

    hub.on_reply = lose
    done = upload(release, REPO)
    assert gone
    assert len(hub.store.repos[REPO].commits) == 2
    assert hub.store.repos[REPO].refs["main"] == done.commit


def test_death_at_any_request_and_again(hub: Hub, release: Release, killer: Killer) -> None:
    """Every request of an upload, killed before it is sent and after its answer; each time the next run completes."""
    upload(release, REPO)
    total = killer.seen
    assert total > 12
    survived = set()
    for answered in (False, True):
        for alive in range(total):
            hub.store.repos.clear()
            hub.store.objects.clear()
            killer.arm(alive, answered)
            with pytest.raises(Killed):
                upload(release, REPO)
            survived.add(whole(hub))
            killer.arm(10**9, False)
            upload(release, REPO)
            assert whole(hub)
            assert len(hub.store.repos[REPO].commits) == 2
    assert survived == {False, True}


def test_what_has_arrived_is_not_sent_again(hub: Hub, release: Release, killer: Killer) -> None:
    upload(release, REPO)
    puts = [k for k, line in enumerate(hub.requests) if line.startswith("PUT /lfs/")]
    hub.store.repos.clear()
    hub.store.objects.clear()
    hub.requests.clear()
    killer.arm(puts[-1] - 1, False)
    with pytest.raises(Killed):
        upload(release, REPO)
    before = sum(line.startswith("PUT /lfs/") for line in hub.requests)
    killer.arm(10**9, False)
    upload(release, REPO)
    assert before > 0
    assert sum(line.startswith("PUT /lfs/") for line in hub.requests) == len(puts)


def test_kill_minus_nine_between_files(hub: Hub, artifact: Artifact, tmp_path: Path) -> None:
    """The real command in a real process, killed by the operating system when the commit arrives."""
    command = [sys.executable, "-m", "bagel_compress", "publish", str(artifact.path), REPO, "--base-model", BASE,
               "--receipts", str(tmp_path / "receipts"), "--draft", "--private"]  # fmt: skip
    process: list[subprocess.Popen[str]] = []

    def kill(number: int, line: str) -> None:
        if "/commit/" in line and process:
            process.pop().kill()

    hub.on_request = kill
    process.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    victim = process[0]
    out, err = victim.communicate(timeout=120)
    assert victim.returncode == -signal.SIGKILL if sys.platform != "win32" else victim.returncode != 0, err
    assert TOKEN not in out + err
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert whole(hub)
    assert TOKEN not in again.stdout + again.stderr


def test_the_same_release_again_changes_nothing(hub: Hub, release: Release) -> None:
    first = upload(release, REPO)
    assert upload(release, REPO).commit == first.commit
    assert len(hub.store.repos[REPO].commits) == 2


def test_a_file_changed_after_it_was_verified(hub: Hub, release: Release) -> None:
    flip(release.folder / release.publishable.manifest.shards[0])
    with pytest.raises(GateError, match=r"model-00001-of-\d+\.safetensors was changed after it had been verified"):
        upload(release, REPO)
    assert not whole(hub)


def test_what_arrived_is_compared(hub: Hub, release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    from hub_store import File, Store

    real = Store.commit

    def damaging(store: Store, repo: object, *rest: object) -> object:
        commit = real(store, repo, *rest)  # type: ignore[arg-type]
        shard = release.publishable.manifest.shards[0]
        commit.files[shard] = File("0" * 64, commit.files[shard].size, lfs=True)
        return commit

    monkeypatch.setattr(Store, "commit", damaging)
    with pytest.raises(
        GateError, match=r"does not have the files that were sent: model-00001-of-\d+\.safetensors differs"
    ):
        upload(release, REPO)


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, REPO, "not logged in"),
        ("hf_readonlytoken", REPO, "your token may only read"),
        ("hf_expiredtoken00", REPO, "invalid or has expired"),
        (TOKEN, "bob/BAGEL-7B-MoT-NF4", "belongs to somebody else"),
        (TOKEN, "nobody/BAGEL-7B-MoT-NF4", "belongs to somebody else"),
        (TOKEN, "bob/secret", "belongs to somebody else"),
    ],
)
def test_who_may_not(
    hub: Hub, release: Release, monkeypatch: pytest.MonkeyPatch, token: str | None, repo: str, message: str
) -> None:
    hub.store.users |= {
        "hf_readonlytoken": User("ann", role="read"), "hf_expiredtoken00": User("ann", expired=True),
        "hf_bobbobbob": User("bob"),
    }  # fmt: skip
    hub.store.create(hub.store.users["hf_bobbobbob"], None, "BAGEL-7B-MoT-NF4", private=False)
    hub.store.create(hub.store.users["hf_bobbobbob"], None, "secret", private=True)
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises((HubError, PublishError), match=message) as error:
        upload(release, repo)
    assert "hf_" not in str(error.value)
    assert not any(line.startswith("PUT") or "/commit/" in line for line in hub.requests)


def test_an_organisation_of_ones_own(hub: Hub, release: Release) -> None:
    assert upload(release, "lab/BAGEL-7B-MoT-NF4").repo == "lab/BAGEL-7B-MoT-NF4"


def test_another_build_is_replaced_only_when_told(
    hub: Hub, release: Release, built: Callable[[str], Artifact], tmp_path: Path
) -> None:
    other = make_release(built("raw"), tmp_path / "other", Origin(REPO, BASE), draft=True)
    upload(other, REPO, private=True)
    before = hub.store.repos[REPO].refs["main"]
    with pytest.raises(PublishError, match=r"already holds another build .* --replace"):
        upload(release, REPO)
    assert hub.store.repos[REPO].refs["main"] == before
    upload(release, REPO, replace=True)
    shown = hub.store.repos[REPO].head("main").files
    assert set(shown) == set(release.files) | {".gitattributes"}


def test_a_repository_with_something_else_in_it(hub: Hub, release: Release) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="pytorch_model.bin", repo_id=REPO)
    with pytest.raises(PublishError, match=r"already holds other files \(pytorch_model.bin\)"):
        upload(release, REPO)


def test_pull_request_to_somebody_else_once(hub: Hub, release: Release) -> None:
    hub.store.users["hf_bobbobbob"] = User("bob")
    hub.store.create(hub.store.users["hf_bobbobbob"], None, "builds", private=False)
    first = upload(release, "bob/builds", create_pr=True)
    again = upload(release, "bob/builds", create_pr=True)
    repo = hub.store.repos["bob/builds"]
    assert repo.pulls == ["refs/pr/1"]
    assert first.pull_request == again.pull_request
    assert MANIFEST in repo.head("refs/pr/1").files
    assert MANIFEST not in repo.head("main").files


def test_a_pull_request_whose_answer_was_lost_is_found(hub: Hub, release: Release) -> None:
    hub.store.users["hf_bobbobbob"] = User("bob")
    hub.store.create(hub.store.users["hf_bobbobbob"], None, "builds", private=False)
    gone: list[str] = []

    def lose(number: int, line: str) -> None:
        if "/commit/" in line and not gone:
            gone.append(line)
            raise ConnectionAbortedError

    hub.on_reply = lose
    done = upload(release, "bob/builds", create_pr=True)
    assert gone
    assert hub.store.repos["bob/builds"].pulls == ["refs/pr/1"]
    assert done.pull_request is not None


def test_a_branch_of_ones_own(hub: Hub, release: Release) -> None:
    upload(release, REPO, revision="v2")
    assert whole(hub, "v2")
    assert MANIFEST not in hub.store.repos[REPO].head("main").files


def test_a_draft_stays_private(hub: Hub, built: Callable[[str], Artifact], tmp_path: Path) -> None:
    draft = make_release(built("nf4"), tmp_path / "draft", Origin(REPO, BASE), draft=True)
    upload(draft, REPO)
    assert hub.store.repos[REPO].private
    hub.store.repos[REPO].private = False
    with pytest.raises(PublishError, match="is public, a draft is not"):
        upload(draft, REPO)


def test_somebody_commits_meanwhile(hub: Hub, release: Release) -> None:
    def meddle(number: int, line: str) -> None:
        if "/commit/" in line:
            hub.on_request = lambda k, text: None
            repo = hub.store.repos[REPO]
            repo.refs["main"] = repo.add(repo.refs["main"], "meddling", {}).oid

    hub.on_request = meddle
    with pytest.raises(HubError, match="somebody else changed it"):
        upload(release, REPO)


def test_the_hub_is_down(hub: Hub, release: Release) -> None:
    hub.faults = [Fault("PUT /lfs/", times=10**6)]
    with pytest.raises(HubError, match="the Hub answered 503 repeatedly"):
        upload(release, REPO)
    hub.faults = [Fault("GET /api/whoami", "cut", times=100)]
    with pytest.raises(HubError, match="cannot be reached"):
        upload(release, REPO)
    hub.faults = []
    upload(release, REPO)
    assert whole(hub)


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_moment_and_again(
    count: int, hub: Hub, artifact: Artifact, cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """What can be seen on the Hub is a whole build or none, and the same command completes it."""
    receipts = tmp_path / "receipts"

    def command(repo: str) -> tuple[object, ...]:
        return "publish", artifact.path, repo, "--base-model", BASE, "--receipts", receipts

    (code, _, err), calls = calls_of(lambda: cli(*command("ann/whole")))
    assert code == 0, err
    expected = hub.store.repos["ann/whole"].head("main").files.keys()
    beside = {p.name for p in artifact.path.parent.glob("nf4*")}
    for call in moments(calls, count, 4):
        repo = f"ann/build{call}"
        with sigint_at(call):
            code, _, err = cli(*command(repo))
        assert code in (0, 130), err
        assert "Traceback" not in err
        for thread in threading.enumerate():  # a request that was sent goes on; here the process does too
            if thread.name == "request":
                thread.join()
        there = hub.store.repos[repo].head("main").files if repo in hub.store.repos else {}
        assert "manifest.json" not in there or there.keys() == expected, call
        code, _, err = cli(*command(repo))
        assert code == 0, (call, err)
        assert verify_repo(repo).faults == ()
        assert hub.store.repos[repo].head("main").files.keys() == expected
        assert {p.name for p in artifact.path.parent.glob("nf4*")} == beside, call
