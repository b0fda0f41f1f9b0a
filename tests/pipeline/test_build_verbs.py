"""The verbs: exit codes, one sentence on stderr, JSON on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pipeline_data import NF4, RAW, TINY

from bagel_compress.cli import main


def test_plan_compress_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(NF4)
    recipe, source, out = str(tmp_path / "r.yaml"), str(TINY), str(tmp_path / "out" / "a")
    assert main(["plan", recipe, "--source", source, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["compress", recipe, "--source", source, "--out", out, "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["plan"] == plan["digest"]
    assert built["bytes"] == plan["bytes"] == sum(plan["shards"].values())
    assert main(["inspect", out, "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert inspected["bytes"] == plan["bytes"]
    assert [g["nbytes"] for g in inspected["groups"]] == [g["nbytes"] for g in plan["groups"]]
    assert main(["inspect", out]) == 0
    assert f"({plan['bytes'] / 2**30:.3f} GiB)" in capsys.readouterr().out
    assert main(["inspect", source]) == 0
    assert "454,608" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["plan", "{dir}/none.yaml"], "does not exist"),
        (["plan", "{dir}/bad.yaml"], "unknown codec 'nf5'"),
        (["plan", "{dir}/idle.yaml", "--source", "{tiny}"], "rule 1 matches no tensor"),
        (["plan", "{dir}/open.yaml", "--source", "{tiny}"], "has no rule for"),
        (["plan", "{dir}/raw.yaml", "--source", "{dir}/none"], "does not exist"),
        (["compress", "{dir}/raw.yaml", "--source", "{dir}", "--out", "{dir}/o"], "has no weights"),
        (["compress", "{dir}/raw.yaml", "--out", "{dir}/o"], "the recipe names none"),
        (["compress", "{dir}/raw.yaml", "--source", "{tiny}", "--out", "{dir}"], "not empty"),
        (["inspect", "{dir}/none"], "does not exist"),
        (["synth", "tiny", "--out", "{dir}"], "not empty"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    files = {
        "raw.yaml": RAW,
        "bad.yaml": RAW.replace("codec: raw", "codec: nf5"),
        "idle.yaml": RAW.replace("[{", "[{match: {layer: 99}, codec: raw}, {"),
        "open.yaml": RAW.replace("match: {}", "match: {component: vit}"),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main([a.format(dir=tmp_path, tiny=TINY) for a in argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error
    assert error.startswith("bagel-compress: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing half-written


def test_nothing_is_written_for_a_recipe_over_its_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(f"{RAW}\nbudget_gb: 0.0005")
    assert main(["compress", str(tmp_path / "r.yaml"), "--source", str(TINY), "--out", str(tmp_path / "o")]) == 2
    assert "its budget is 0.0005 GB" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
