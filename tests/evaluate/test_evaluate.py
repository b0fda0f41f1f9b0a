"""Every benchmark's layout goes through the runner on BAGEL-nano; runs resume, share and refuse as promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniature
import pytest

from bagel.nano.scenes import SIDE
from bagel_compress.errors import ArtifactError, BenchmarkError
from bagel_compress.evaluate import evaluate as module
from bagel_compress.evaluate.benchmarks import BENCHMARKS, benchmark_info
from bagel_compress.evaluate.evaluate import Run, Scorers, evaluate, read_items, run_part
from bagel_compress.evaluate.runner import ANSWERS, PICTURES, Shard, answers_of

NANO = Path(__file__).parents[2] / "bagel_compress" / "data" / "BAGEL-nano"
DRAWN = {
    "geneval": {f"{p:05}/samples/{i:05}.png" for p in range(2) for i in range(2)},
    "wise": {"1.png", "401.png", "701.png"},
    "dpg": {"0.png"},
    "gedit": {f"fullset/color_alter/en/k{i}{mark}.png" for i in (0, 2) for mark in ("", "_SRCIMG")},
    "imgedit": {"7.png"},
    "kris": {f"{c}/1.png" for c in ("biology", "count_change", "temporal_prediction", "viewpoint_change")},
    "rise": {f"{c}_reasoning/{c}_reasoning_1.png" for c in ("temporal", "spatial", "logical")},
    "intelligentbench": {"a.png"},
}


@pytest.fixture(autouse=True, scope="module")
def nano() -> Any:
    """BAGEL-nano opened once."""
    opened = module.open_any(str(NANO), "cpu", "fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_any", lambda *_: opened)
        yield opened


def run_of(name: str, data: Path, out: Path, **more: Any) -> Run:
    small = {"steps": 2, "side": SIDE, "dtype": "fp32", "digest": "nano"}
    return Run(name, str(NANO), str(data), str(out), **{**small, **more})


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_lie_where_the_official_scorer_looks(name: str, tmp_path: Path) -> None:
    data = miniature.MAKE[name](tmp_path / "data")
    pictures = 2 if name == "geneval" else 0
    report = evaluate(run_of(name, data, tmp_path / "out", pictures=pictures, think=name == "dpg"))
    assert report is not None
    drawn = files(tmp_path / "out" / PICTURES)
    assert {path for path in drawn if path.endswith(".png")} == DRAWN[name]
    assert ("00000/metadata.jsonl" in drawn) == (name == "geneval")
    assert ("0.txt" in drawn) == (name == "dpg")
    assert report.scores == ()
    assert "Not scored" in report.notes[0]
    assert any("num_timesteps 2 instead of 50" in phrase for phrase in report.differs)


@pytest.mark.parametrize("name", ["mme", "mmvp", "mmmu"])
def test_questions_are_answered_and_scored(name: str, tmp_path: Path) -> None:
    data = miniature.MAKE[name](tmp_path / "data")
    report = evaluate(run_of(name, data, tmp_path / "out"))
    assert report is not None
    assert report.items == len(answers_of(tmp_path / "out")) == {"mme": 8, "mmvp": 4, "mmmu": 3}[name]
    assert report.scores
    official = {score.name: score.official for score in report.scores}
    assert {k: v for k, v in official.items() if v} == dict(benchmark_info(name).official)


def test_every_benchmark_has_a_miniature() -> None:
    assert set(BENCHMARKS) - set(miniature.MAKE) == {"geneval-rewritten"}


def test_parts_and_a_killed_run_give_the_same_pictures(tmp_path: Path) -> None:
    data = miniature.geneval(tmp_path / "data")
    whole, parts = (run_of("geneval", data, tmp_path / name, pictures=2) for name in ("whole", "parts"))
    evaluate(whole)
    run_part(module.replace(parts, shard=(1, 2)))
    assert evaluate(module.replace(parts, shard=(1, 2))) is None  # the other part is missing
    for picture in (tmp_path / "parts" / PICTURES).rglob("00000.png"):
        picture.unlink()  # killed before this one was written
    assert evaluate(module.replace(parts, shard=(0, 2))) is None
    assert evaluate(module.replace(parts, shard=(1, 2))) is not None
    assert files(tmp_path / "whole" / PICTURES) == files(tmp_path / "parts" / PICTURES)


def test_a_killed_run_of_questions_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    data, out = miniature.mme(tmp_path / "data"), tmp_path / "out"
    evaluate(run_of("mme", data, out))
    [log] = (out / ANSWERS).iterdir()
    content, scores = log.read_bytes(), (out / "values.json").read_bytes()
    log.write_bytes(content[: len(content) // 2])  # in the middle of a line
    evaluate(run_of("mme", data, out))
    assert log.read_bytes() == content
    assert (out / "values.json").read_bytes() == scores


def test_another_config_is_refused(tmp_path: Path) -> None:
    data, out = miniature.mmvp(tmp_path / "data"), tmp_path / "out"
    evaluate(run_of("mmvp", data, out))
    for change in ({"seed": 7}, {"digest": "other"}, {"limit": 1}, {"dtype": "bf16"}):
        with pytest.raises(BenchmarkError, match=r"holds a run with another"):
            evaluate(run_of("mmvp", data, out, **change))
    (data / "MMVP Images" / "1.jpg").write_bytes(miniature.png(9))
    with pytest.raises(BenchmarkError, match=r"another data"):
        evaluate(run_of("mmvp", data, out))


def test_the_difference_to_a_reference_is_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = miniature.mmvp(tmp_path / "data")
    evaluate(run_of("mmvp", data, tmp_path / "full"))
    rows = [{"id": str(i), "answer": "A" if i % 2 else "B"} for i in range(1, 5)]
    miniature.put(tmp_path / "full" / ANSWERS / "0-of-1.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    reference = evaluate(run_of("mmvp", data, tmp_path / "full"))  # all right now
    wrong = [{**row, "answer": "C"} for row in rows]
    run_part(run_of("mmvp", data, tmp_path / "own", digest="build"))
    miniature.put(tmp_path / "own" / ANSWERS / "0-of-1.jsonl", "".join(json.dumps(r) + "\n" for r in wrong))
    report = evaluate(run_of("mmvp", data, tmp_path / "own", digest="build"), Scorers(against=tmp_path / "full"))
    assert reference is not None
    assert report is not None
    assert [s.value for s in reference.scores] == [100, 100]
    assert [(s.delta, s.delta_low, s.delta_high) for s in report.scores] == [(-100, -100, -100)] * 2
    assert report.worse == list(report.scores)
    assert "-100.00 (-100.00 to -100.00)" in (tmp_path / "own" / "report.md").read_text()
    with pytest.raises(BenchmarkError, match=r"another limit"):
        evaluate(run_of("mmvp", data, tmp_path / "some", limit=1), Scorers(against=tmp_path / "full"))


@pytest.mark.parametrize(
    ("name", "lost", "says"),
    [
        ("mme", "questions", "a folder of one .txt per subtask"),
        ("mmvp", "Questions.csv", "Questions.csv"),
        ("mmmu", "Art", "one folder per subject"),
        ("wise", "natural_science.json", "natural_science.json"),
        ("imgedit", "singleturn/singleturn.json", "the edits"),
    ],
)
def test_a_missing_file_is_named_with_its_place(name: str, lost: str, says: str, tmp_path: Path) -> None:
    data = miniature.MAKE[name](tmp_path / "data")
    (data / lost).rename(tmp_path / "away")
    with pytest.raises(BenchmarkError, match=rf"{says}.*put it there"):
        read_items(benchmark_info(name), data, 1)


def test_damaged_rows_are_counted_and_too_many_are_an_error(tmp_path: Path) -> None:
    line = json.dumps({"tag": "colors", "include": [], "prompt": "a red circle"}) + "\n"
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(line * 150 + "{broken\n")
    assert len(read_items(benchmark_info("geneval"), tmp_path, 1).skipped) == 1
    path.write_text(line * 150 + json.dumps({**json.loads(line), "prompt": "a \ud800 circle"}) + "\n")
    assert "line 151: prompt holds half a character" in read_items(benchmark_info("geneval"), tmp_path, 1).skipped[0]
    path.write_text(line * 50 + "{broken\n")
    with pytest.raises(BenchmarkError, match=r"1 of 51 rows cannot be used.*line 51"):
        read_items(benchmark_info("geneval"), tmp_path, 1)


def test_pictures_that_do_not_open_are_an_error_with_their_names(tmp_path: Path) -> None:
    data = miniature.imgedit(tmp_path / "data")
    (data / "singleturn" / "style" / "0.png").write_bytes(miniature.png(0)[:60])
    with pytest.raises(BenchmarkError, match=r"1 of 1 pictures cannot be used.*0\.png is not a readable picture"):
        evaluate(run_of("imgedit", data, tmp_path / "out"))


@pytest.mark.parametrize("name", ["../outside", "/etc/x", "a\\b"])
def test_names_from_data_do_not_leave_the_folder(name: str, tmp_path: Path) -> None:
    data = miniature.imgedit(tmp_path / "data")
    row = {"id": "style/0.png", "prompt": "blue", "edit_type": "style"}
    miniature.put(data / "singleturn" / "singleturn.json", {name: row})
    with pytest.raises(BenchmarkError, match="leads out of its folder"):
        read_items(benchmark_info("imgedit"), data, 1)


def test_a_subset_keeps_pairs(tmp_path: Path) -> None:
    data = miniature.mme(tmp_path / "data")
    report = evaluate(run_of("mme", data, tmp_path / "out", limit=2))
    assert report is not None
    assert report.items == 4
    assert "a subset of 2 units" in report.differs
    with pytest.raises(BenchmarkError, match="expected I/N"):
        Shard(2, 2)


def test_the_command_line_runs_a_benchmark_and_the_suite(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    miniature.mme(tmp_path / "data" / "mme")
    miniature.mmvp(tmp_path / "data" / "mmvp")
    common = (NANO, "--dtype", "fp32", "--steps", "2", "--side", SIDE)
    code, text, err = cli("evaluate", "mme", *common, "--data", tmp_path / "data/mme", "--out", tmp_path / "one")
    assert (code, "### MME" in text) == (0, True), err
    suite = ("evaluate", "--suite", "smoke", *common, "--data", tmp_path / "data")
    code, text, err = cli(*suite, "--out", tmp_path / "full", "--json")
    assert code == 0, err
    found = json.loads(text)
    assert [r["benchmark"] for r in found["reports"]] == ["mme", "mmvp"]
    assert "mmmu" in found["absent"]
    code, _, err = cli(*suite, "--out", tmp_path / "again", "--against", tmp_path / "full")
    assert code == 0, err
    code, _, err = cli("evaluate", "mne", *common, "--data", tmp_path / "data/mme", "--out", tmp_path / "x")
    assert (code, "did you mean mme" in err) == (2, True)


def test_a_worse_build_ends_the_suite_with_exit_code_1(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    miniature.mmvp(tmp_path / "data" / "mmvp")
    suite = ("evaluate", "--suite", "smoke", NANO, "--dtype", "fp32", "--data", tmp_path / "data")
    for name, letters in (("full", "AB"), ("build", "CC")):
        code, _, err = cli(*suite, "--out", tmp_path / name)
        assert code == 0, err
        rows = [{"id": str(i), "answer": letters[(i + 1) % 2]} for i in range(1, 5)]
        miniature.put(
            tmp_path / name / "mmvp" / ANSWERS / "0-of-1.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        )
        code, _, err = cli(*suite, "--out", tmp_path / name)
    code, text, err = cli(*suite, "--out", tmp_path / "build", "--against", tmp_path / "full")
    assert code == 1, err
    assert "pairs is worse by 100.00" in text


def test_the_copy_for_publishing_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    report = evaluate(run_of("mmvp", miniature.mmvp(tmp_path / "data"), tmp_path / "out"))
    assert report is not None
    private = report.model_copy(update={"model": "/home/ann/nf4", "skipped": ("/home/ann/1.jpg: damaged",)})
    shown = private.public()
    assert "/home/ann" in private.model_dump_json()
    assert "/home/ann" not in shown.model_dump_json()
    assert (shown.model, shown.notes) == ("nf4", ("Items left out: 1.",))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Real processes, each with a model of its own; the report of the two together is that of one."""
    miniature.mme(tmp_path / "mme")
    miniature.dpg(tmp_path / "dpg")
    (tmp_path / "dpg" / "1.txt").write_text("a blue square\n")
    for name, kind in (("mme", ANSWERS), ("dpg", PICTURES)):
        common = ("evaluate", name, NANO, "--dtype", "fp32", "--steps", "2", "--side", SIDE, "--data", tmp_path / name)
        found = []
        for processes in (1, 2):
            out = tmp_path / f"{name}-{processes}"
            code, text, err = cli(*common, "--out", out, "--processes", processes, "--json")
            assert code == 0, err
            found.append((json.loads(text)["scores"], answers_of(out), files(out / PICTURES)))
            assert len(list((out / ANSWERS).glob("*.jsonl"))) == processes
        assert found[0] == found[1]
        assert any(found[0][1:]), kind


def test_a_report_goes_beside_the_build_and_is_bound_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bagel_compress.build.artifact import Artifact
    from bagel_compress.build.compress import compress
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.scores.evaluation_report import load_evaluations
    from bagel_compress.source.checkpoint import Checkpoint

    source = Checkpoint.open(NANO)
    build = compress(make_plan(source, Recipe.load("raw")), source, tmp_path / "build")
    what = module.replace(run_of("mmvp", miniature.mmvp(tmp_path / "data"), tmp_path / "out"), model=str(build.path))
    shown = list[Path]()
    monkeypatch.setattr(module, "write_pages_again", lambda path, digest: shown.append(path / digest))
    report = evaluate(module.replace(what, digest=""))
    assert report is not None
    assert load_evaluations(build.path, build.digest) == [report.public()]
    assert shown == [build.path / build.digest]
    assert report.measured_by.startswith("bagel-compress ")
    assert "CPU" in report.measured_on
    assert Artifact.open(build.path).verify() == []
    with pytest.raises(ArtifactError, match="belongs to another build"):
        load_evaluations(build.path, "0" * 64)
    (build.path / "reports" / "evaluation-mmvp.json").rename(build.path / "reports" / "evaluation-mme.json")
    with pytest.raises(ArtifactError, match="is about mmvp"):
        load_evaluations(build.path, build.digest)
