"""Packaged prompts of calibration: as many as promised, and none that validation or a benchmark asks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bagel.sampler import Sampler
from bagel_compress.calibrate.calibration_set import CalibrationSet
from bagel_compress.calibrate.make_set import make_set
from bagel_compress.calibrate.prompts import latent_rows, load_jobs, thinned
from bagel_compress.errors import CalibrationError
from bagel_compress.io.packaged import resource
from bagel_compress.run.case import load_cases
from bagel_compress.scores.nano import nano_benchmark

TINY = Path(__file__).parents[1] / "data/golden/checkpoint"
FOLDERS = {"7b": "calibration", "nano": "calibration/nano", "tiny": "calibration/tiny"}
CASES = {"7b": "cases", "nano": "cases/nano", "tiny": "cases/tiny"}


def prompts(which: str) -> Counter[str]:
    return Counter(job.kind for job in load_jobs([resource("exports") / FOLDERS[which]]))


def test_there_are_as_many_as_promised() -> None:
    found = prompts("7b")
    least = {"drawing": 48, "edit": 24, "question": 24, "plan": 16}
    assert {kind: min(found[kind], count) for kind, count in least.items()} == least


@pytest.mark.parametrize("which", sorted(FOLDERS))
def test_no_prompt_is_asked_by_validation(which: str) -> None:
    jobs = load_jobs([resource("exports") / FOLDERS[which]])
    asked = {turn.casefold() for name in CASES.values() for case, _ in load_cases([resource("exports") / name])
             for turn in case.turns if isinstance(turn, str)}  # fmt: skip
    if which == "nano":  # what is asked about a picture is a fixed phrase of the language, and the pictures differ
        jobs = [job for job in jobs if job.kind in ("drawing", "plan")]
        asked |= {p.turns[-1].casefold() for p in nano_benchmark().prompts if isinstance(p.turns[-1], str)}
    assert not {job.asked.prompt.casefold() for job in jobs} & asked


@pytest.mark.parametrize("which", sorted(FOLDERS))
def test_answers_are_there_for_sets_of_given_pictures(which: str) -> None:
    jobs = load_jobs([resource("exports") / FOLDERS[which]])
    assert all(job.asked.answer for job in jobs if job.kind in ("question", "plan"))


def test_thinned_keeps_every_kind_and_what_it_refers_to() -> None:
    jobs = load_jobs([resource("exports") / "calibration"])
    few = thinned(jobs, 0.25)
    assert {job.kind for job in few} == {job.kind for job in jobs}
    names = {job.name for job in few}
    assert all(job.asked.picture in names for job in few if job.asked.picture)
    assert latent_rows(few, 16) < 0.6 * latent_rows(jobs, 16)


def test_the_thinnest_set_has_enough_decoded_words_for_the_last_layer() -> None:
    """A quarter of the released model's width, 896 rows; a word has a token at least."""
    fewest = thinned(load_jobs([resource("exports") / "calibration"]), 0.0)
    assert sum(len(job.asked.answer.split()) for job in fewest) >= 896


def test_unknown_drawings_and_twice_used_names_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "edits.yaml"
    file.write_text("{kind: edit, prompts: [{prompt: make it red, picture: house}]}")
    with pytest.raises(CalibrationError, match="refers to a drawing 'house'"):
        load_jobs([file])
    file.write_text("{kind: drawing, prompts: [{prompt: a, name: x}, {prompt: b, name: x}]}")
    with pytest.raises(CalibrationError, match="two calibration prompts are called 'x'"):
        load_jobs([file])
    file.write_text("{kind: edit, prompts: [{prompt: make it red}]}")
    with pytest.raises(CalibrationError, match="names no picture"):
        load_jobs([file])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="holds no calibration prompts"):
        load_jobs([tmp_path / "empty"])


def test_a_set_that_stopped_goes_on(tmp_path: Path) -> None:
    sampler = Sampler.from_dir(TINY)
    jobs = [job for job in load_jobs([resource("exports") / "calibration/tiny"]) if job.kind != "plan"][:4]
    whole = make_set(sampler, ("tiny", "digest"), jobs, tmp_path / "whole")
    seen: list[str] = []

    class StoppedError(Exception):
        pass

    def stop(message: str) -> None:
        if len(seen) == 2:
            raise StoppedError
        seen.append(message)

    with pytest.raises(StoppedError):
        make_set(sampler, ("tiny", "digest"), jobs, tmp_path / "set", progress=stop)
    seen.clear()
    again = make_set(sampler, ("tiny", "digest"), jobs, tmp_path / "set", progress=seen.append)
    assert len(seen) == 2  # two of four were kept
    assert again.digest == whole.digest
    assert CalibrationSet.open(tmp_path / "set").rows == whole.rows
    assert not (tmp_path / "set.parts").exists()
