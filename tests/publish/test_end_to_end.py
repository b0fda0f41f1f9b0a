"""From a checkpoint to a stranger's picture: compress, validate, publish through faults, pull, verify, generate."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import Fault, Hub, User
from PIL import Image
from publish_data import BASE, REPO, TOKEN

from bagel_compress.build.artifact import Artifact
from bagel_compress.io.packaged import find_recipe

Cli = Callable[..., tuple[int, str, str]]
PROMPT, FLAGS = "a red teapot", ("--steps", 4, "--size", "64x64", "--seed", 7)


TARGET = """
name: small
device: {name: NVIDIA GeForce RTX 3060 12GB, memory_mib: 12288, reserved_mib: 700}
sizes: {image: [64, 64], input_image: [56, 56], prompt_tokens: 16, think_tokens: 16, answer_tokens: 16}
tasks: [t2i]
"""


def validated(artifact: Artifact, tiny: Path, trace: Path, cli: Cli) -> Artifact:
    """Real traces of one case of each task, a real parity report, a real prediction of the memory on a card."""
    from bagel_compress.io.packaged import resource
    from bagel_compress.run.case import load_cases
    from bagel_compress.validation.artifact import record_source, validate_artifact

    folder = resource("exports") / "cases" / "tiny"
    cases = load_cases([folder / f"{name}.yaml" for name in ("t2i_square", "edit", "understand", "think_t2i")])
    record_source(tiny, cases, trace, floors=())
    report = validate_artifact(artifact.path, [trace])
    assert report.passed, report.broken
    code, _, err = cli("budget", artifact.path, "--target", trace.with_name("small.yaml"))
    assert code == 0, err
    return artifact


def test_the_same_picture_after_the_journey(
    hub: Hub, tiny: Path, tmp_path: Path, cli: Cli, fresh_cache: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "build"
    text = find_recipe("int8-24gb").read_text(encoding="utf-8")
    recipe = tmp_path / "int8-24gb.yaml"  # as shipped, but promising a card at sizes that the tiny model can draw
    recipe.write_text(re.sub(r"targets: .*", "targets: [small]", text))
    (tmp_path / "small.yaml").write_text(TARGET)
    assert cli("compress", recipe, "--source", tiny, "--out", out)[0] == 0
    validated(Artifact.open(out), tiny, tmp_path / "trace.safetensors", cli)
    assert cli("generate", out, PROMPT, *FLAGS, "--out", "before.png")[0] == 0

    hub.faults = [Fault("PUT /lfs/", times=2), Fault("PUT /lfs/", "cut")]
    code, text, _ = cli("publish", out, REPO, "--base-model", BASE, "--json")
    assert code == 0
    assert all(fault.times == 0 for fault in hub.faults)
    assert (tmp_path / "exports" / "receipts" / "int8-24gb--small.json").exists()

    shutil.rmtree(out)
    fresh_cache()
    code, text, err = cli("verify", REPO, "--full")
    assert code == 0, text + err
    assert cli("generate", REPO, PROMPT, *FLAGS, "--out", "after.png")[0] == 0
    before, after = (Image.open(tmp_path / f"{name}.png") for name in ("before", "after"))
    assert before.tobytes() == after.tobytes()  # the files name the model as it was asked for


def test_refusals_on_the_command_line(hub: Hub, artifact: Artifact, cli: Cli, tmp_path: Path) -> None:
    (artifact.path / "reports" / "parity.json").unlink()
    code, out, err = cli("publish", artifact.path, REPO)
    assert (code, out) == (1, "")
    assert "no parity report" in err
    assert "--base-model" in err
    code, _, err = cli("publish", artifact.path, "not a repository")
    assert code == 2
    assert cli("verify", tmp_path / "nowhere")[0] == 2
    assert not hub.store.repos


def test_dry_run(hub: Hub, artifact: Artifact, cli: Cli, publish: Callable[..., object]) -> None:
    code, out, _ = cli("publish", artifact.path, REPO, "--base-model", BASE, "--dry-run")
    assert code == 0
    assert "does not exist yet" in out
    assert not hub.store.repos
    assert not any(line.startswith(("PUT", "POST")) for line in hub.requests)
    publish(artifact)
    hub.store.repos[REPO].head("main").files["old/notes.txt"] = hub.store.keep(b"notes", lfs=False)
    code, out, _ = cli("publish", artifact.path, REPO, "--base-model", BASE, "--license", "mit", "--dry-run")
    assert [line.split() for line in out.splitlines() if line.startswith("  ?")] == [["?", "old/notes.txt"]]
    changed = [line.split()[-1] for line in out.splitlines() if line.startswith("  ~")]
    assert changed == ["README.md"]
    assert "-license: apache-2.0" in out
    assert "+license: mit" in out
    folder = artifact.path.with_name("nf4.release")
    assert "license: mit" in (folder / "README.md").read_text()


def test_card_prints_without_publishing(hub: Hub, artifact: Artifact, cli: Cli) -> None:
    code, out, _ = cli("card", artifact.path, REPO, "--base-model", BASE)
    assert code == 0
    assert "DRAFT" not in out
    (artifact.path / "reports" / "parity.json").unlink()
    assert "DRAFT" in cli("card", artifact.path, REPO)[1]
    assert not hub.requests


def test_verify_exits_with_one(
    hub: Hub, artifact: Artifact, publish: Callable[..., object], cli: Cli, fresh_cache: Callable[[], Path]
) -> None:
    publish(artifact)
    assert cli("verify", REPO)[0] == 0
    fresh_cache()
    files = hub.store.repos[REPO].head("main").files
    files["config.json"] = hub.store.keep(b"{}", lfs=False)
    code, out, _ = cli("verify", REPO)
    assert code == 1
    assert "config.json is not what was released" in out


@pytest.mark.parametrize("fault", [None, "expired", "read", "echo", "down", "forbidden"])
def test_the_token_is_nowhere(
    hub: Hub, artifact: Artifact, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None,
    caplog: pytest.LogCaptureFixture, fresh_cache: Callable[[], Path],
) -> None:  # fmt: skip
    """Everything printed, logged or written by publish and verify, in success and in failure, is searched for it."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    if fault in ("expired", "read"):
        hub.store.users[TOKEN] = User("ann", expired=fault == "expired", role="read" if fault == "read" else "write")
    if fault == "down":
        hub.faults = [Fault("POST .*/objects/batch", times=100)]
    if fault == "forbidden":
        hub.faults = [Fault("POST .*/commit/", status=403)]
    if fault == "echo":  # a server that sends the token back in its message
        from hub_store import RefusedError, Store

        def refuse(*_: object) -> None:
            raise RefusedError(418, "", f"Bearer {TOKEN} is not welcome")

        monkeypatch.setattr(Store, "commit", refuse)
    code, out, err = cli("publish", artifact.path, REPO, "--base-model", BASE, "--receipts", "receipts")
    assert code == (0 if fault is None else 2), err
    texts = [out, err, caplog.text, *cli("verify", REPO)[1:]]
    assert not [text for text in texts if TOKEN in text or TOKEN[3:] in text]
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 20
    assert not [p for p in written if TOKEN.encode() in p.read_bytes()]
