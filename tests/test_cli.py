"""The verbs that use a model, and what every verb promises: one sentence and exit 2 on wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Cli = Callable[..., tuple[int, str, str]]
FAST = ("--steps", "3")


def test_generate_writes_a_png_and_repeats(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b" / "c.png"]
    for file in files:
        code, out, _ = cli(
            "generate", tiny, "a red cat", *FAST, "--size", "64x48", "--seed", 7, "--out", file, "--json"
        )
        assert code == 0
        assert json.loads(out)["image"] == str(file)
    assert Image.open(files[0]).size == (64, 48)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_generate_with_an_empty_prompt_and_thoughts(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    options = ("--size", "32x32", "--think", "--max-tokens", "4", "--json", "--out", tmp_path / "x.png")
    code, out, _ = cli("generate", tiny, "", *FAST, *options)
    assert code == 0
    assert json.loads(out)["thoughts"]


def test_edit_and_ask(cli: Cli, tiny: Path, golden: Path, tmp_path: Path) -> None:
    picture = golden / "traces" / "img_b.png"
    code, _, _ = cli("edit", tiny, picture, "make it night", *FAST, "--out", tmp_path / "x.png")
    assert code == 0
    assert Image.open(tmp_path / "x.png").size == (48, 80)
    code, out, _ = cli("ask", tiny, picture, "what is it?", "--max-tokens", "5", "--json")
    assert code == 0
    assert json.loads(out)["tokens"] <= 5
    assert cli("ask", tiny, "why?", "--max-tokens", "3")[0] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("generate", "{tiny}", "x", "--size", "65x64"), "multiple of 16"),
        (("generate", "{tiny}", "x", "--size", "64x2048"), "at most 128"),
        (("generate", "{tiny}", "x", "--size", "big"), "WIDTHxHEIGHT"),
        (("generate", "{tiny}", "x", "--renorm", "local"), "'channel'"),
        (("generate", "{tiny}", "x", "--steps", "1"), "at least 2"),
        (("generate", "{tmp}/none", "x"), "neither a folder"),
        (("generate", "{tmp}", "x"), "{tmp}"),
        (("generate", "{tiny}", "x", "--device", "abacus"), "abacus"),
        (("edit", "{tiny}", "{tmp}/none.png", "x"), "none.png"),
        (("edit", "{tiny}", "{tiny}/config.json", "x"), "not a readable picture"),
        (("ask", "{tiny}", "x", "--max-tokens", "0"), "at least 1"),
        (("ask", "{tiny}", "{tiny}/config.json"), "a question is missing"),
        (("ask", "{tiny}", "x", "--sample", "--temperature", "0"), "temperature"),
    ],
)
def test_wrong_input(cli: Cli, tiny: Path, tmp_path: Path, argv: tuple[str, ...], said: str) -> None:
    target = tmp_path / "out.png"
    words = [a.format(tiny=tiny, tmp=tmp_path) for a in argv]
    options = ("--out", target) if words[0] != "ask" else ()
    code, _, err = cli(*words, *options)
    assert code == 2
    assert said.format(tmp=tmp_path) in err
    assert "Traceback" not in err
    assert not target.exists()


def test_run_ends_with_a_report_and_repeats(cli: Cli, tiny: Path, tmp_path: Path, small_cases: Path) -> None:
    """plan, compress, trace, validate, report in one verb; twice gives the same artifact; a tight limit fails it."""
    loose, strict = (
        _nf4_with(f"logits.kl_mean: 0.2, latent.path: {limit}", tmp_path / f"{limit}.yaml") for limit in (0.6, 0.06)
    )
    builds = [tmp_path / "one", tmp_path / "two"]
    for out in builds:
        code, printed, err = cli("run", loose, "--source", tiny, "--out", out, "--cases", small_cases)
        assert code == 0, printed + err
        assert "passed" in printed
        assert "Calibrated rounding" in (out / "report.html").read_text(encoding="utf-8")
    files = {p.relative_to(builds[0]) for p in builds[0].rglob("*") if p.is_file()}
    for file in files - {f for f in files if f.parts[0] in ("reports", "report.html")}:
        assert (builds[0] / file).read_bytes() == (builds[1] / file).read_bytes(), file

    code, printed, _ = cli("run", strict, "--source", tiny, "--out", tmp_path / "strict", "--cases", small_cases)
    assert code == 1
    assert "did not pass" in printed


def _nf4_with(override: str, path: Path) -> Path:
    """recipes/nf4.yaml, whose rounding is calibrated, with one limit of its own."""
    text = (Path(__file__).parents[1] / "recipes" / "nf4.yaml").read_text(encoding="utf-8")
    assert "limits: {class: 4-bit}" in text
    path.write_text(text.replace("limits: {class: 4-bit}", f"limits: {{class: 4-bit, overrides: {{{override}}}}}"))
    return path


def test_verbs_have_help_with_examples(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    for verb in ("plan", "compress", "inspect", "trace", "validate", "run", "generate", "edit", "ask", "demo"):
        assert verb in out
        code, text, _ = cli(verb, "--help")
        assert code == 0
        assert "example" in text, verb


def test_no_verb_prints_the_help_and_a_mistyped_one_the_nearest(cli: Cli) -> None:
    code, out, _ = cli()
    assert (code, "verbs:" in out) == (0, True)
    assert cli("compres", "x") == (2, "", "bagel-compress: there is no verb 'compres'; did you mean compress?\n")
    assert "plan, compress, inspect" in cli("zzzzzz")[2]


def test_what_a_message_quotes_is_made_visible_and_cut(cli: Cli, tmp_path: Path) -> None:
    _, _, err = cli("generate", f"{tmp_path}/\x1b[31m\n\u202e{'x' * 5000}", "x")
    assert err.count("\n") == 1
    assert len(err) < 1000
    assert "\\x1b[31m\\n\\u202e" in cli("generate", f"{tmp_path}/\x1b[31m\n\u202e", "x")[2]


def test_where_a_picture_goes_is_found_before_the_model_is_read(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bagel_compress.source.checkpoint import Checkpoint

    def read(*args: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "read", read)
    taken = tmp_path / "taken.png"
    taken.write_bytes(b"a picture")
    for out, said in (
        (tmp_path, "is a folder"), (tmp_path / "x.jpg", "does not end in .png"), (tmp_path / "x", "name it x.png"),
        (taken, "--force to overwrite it"), (taken / "x.png", "no folder that you may write to"),
    ):  # fmt: skip
        code, _, err = cli("generate", tiny, "x", "--out", out)
        assert (code, said in err) == (2, True), err
    assert "at most 128" in cli("generate", tiny, "x", "--size", "256x256", "--out", tmp_path / "y.png")[2]
    assert taken.read_bytes() == b"a picture"


def test_a_picture_is_overwritten_only_if_asked_and_else_numbered(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("out.png", "out-2.png", "out-3.png"):
        code, out, err = cli("generate", tiny, "x", *FAST, "--size", "32x32", "--json")
        assert (code, json.loads(out)["image"]) == (0, expected), err
    Path("out.png").write_bytes(b"old")
    assert cli("generate", tiny, "x", *FAST, "--size", "32x32", "--out", "out.png", "--force")[0] == 0
    assert Image.open("out.png").size == (32, 32)


def test_closed_standard_files_are_not_given_to_the_next_file(tmp_path: Path) -> None:
    """Else what is printed goes into whatever file is opened next: a shard, say."""
    script = (
        "import os, sys; from bagel_compress.cli import main\n"
        "for number in (0, 1, 2): os.close(number)\n"
        "sys.stdin = sys.stdout = sys.stderr = None\n"
        "code = main(['inspect', 'none']), main([])\n"
        f"opened = os.open({str(tmp_path / 'x')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "print('words', flush=True); print('words', file=sys.stderr, flush=True)\n"
        "os.write(opened, f'{code} {opened > 2}'.encode()); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "x").read_text() == "(2, 0) True"


def test_only_what_can_be_resumed_says_so(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bagel.loops.Loops.run", interrupted)
    monkeypatch.setattr("bagel_compress.build.compress.compress", interrupted)
    code, _, err = cli("generate", tiny, "x", "--out", tmp_path / "x.png")
    assert code == 130
    assert err.endswith("bagel-compress: interrupted.\n")
    assert "continues from there" in cli("compress", "nf4-nearest", "--source", tiny, "--out", tmp_path / "a")[2]


def test_a_model_has_a_size_of_its_own(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"default_image_size": 48}), encoding="utf-8")
    assert cli("generate", folder, "x", *FAST, "--out", tmp_path / "x.png")[0] == 0
    assert Image.open(tmp_path / "x.png").size == (48, 48)
    (folder / "config.json").write_text(json.dumps(config | {"default_image_size": 1024}), encoding="utf-8")
    assert "expected at most 128" in cli("generate", folder, "x", "--out", tmp_path / "y.png")[2]


def test_a_benchmark_of_another_world_is_refused_at_once(cli: Cli, tiny: Path) -> None:
    code, _, err = cli("score", tiny)
    assert code == 2
    assert "is not BAGEL-nano or a build of it" in err
