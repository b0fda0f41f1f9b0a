"""Benchmarks that were run on a build are on its page, in its summary and on its card, whichever report came last."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from publish_data import BASE, REPO, parity, write_reports

from bagel_compress.build.artifact import Artifact
from bagel_compress.errors import ArtifactError
from bagel_compress.publishing.card_sections import Origin
from bagel_compress.publishing.release import make_release
from bagel_compress.report.files import write_pages, write_pages_again
from bagel_compress.scores.evaluation_report import EvaluationReport, JudgeUse, Score

SHOWN = (
    "Benchmarks", "81.20 (79.00 to 83.40)", "82", "-2.40 (-4.20 to -0.50)", "measured by bagel-compress 9.9",
    "on H200, torch 2.11", "judged by judge-1 (3 answers without a score)", "not the official run: a subset of 60",
    "differences are to abc123, paired by unit", "Items left out: 1.",
)  # fmt: skip
MARKS = "<script>alert(1)</script> ![x](http://evil/x.png)"


def report_of(artifact: Artifact, **more: object) -> EvaluationReport:
    figure = {"value": 81.2, "low": 79.0, "high": 83.4, "units": 553}
    return EvaluationReport(
        benchmark="geneval", title="GenEval", model="nf4", digest=artifact.digest, measured_by="bagel-compress 9.9",
        measured_on="H200, torch 2.11", differs=("a subset of 60 units",), items=240, skipped=("/home/ann/1: torn",),
        judge=JudgeUse(
            model="judge-1", host="127.0.0.1", answers=9, unreadable=3, prompt_tokens=1, completion_tokens=1,
        ),
        scores=(
            Score(name="overall", official=82.0, delta=-2.4, delta_low=-4.2, delta_high=-0.5, **figure),
            Score(name="counting", **figure),
        ),
        reference="abc123",
    ).model_copy(update=more)  # fmt: skip


class Text(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> Text:
    return Text((folder / "report.html").read_text(encoding="utf-8"))


def test_page_summary_and_card_show_the_same(artifact: Artifact, tmp_path: Path) -> None:
    write_pages(artifact.path, artifact.digest)
    assert "Benchmarks" not in page_of(artifact.path).text
    assert "GenEval" not in (artifact.path / "reports" / "summary.md").read_text()
    report_of(artifact).attach(artifact.path)
    write_pages_again(artifact.path, artifact.digest)
    release = make_release(artifact, tmp_path / "release", Origin(REPO, BASE))
    for folder in (artifact.path, release.folder):
        page, summary = page_of(folder).text, (folder / "reports" / "summary.md").read_text()
        for words in SHOWN:
            assert words in page, words
            assert words in summary or words == "Benchmarks", words
        assert "all 2 scores" in page
        assert "counting" in page
        assert "counting" not in summary
        assert "worse" in page
        assert "**worse**" in summary
        assert "/home/ann" not in page + summary
    card = (release.folder / "README.md").read_text()
    for words in ("81.20 (79.00 to 83.40)", "-2.40 (-4.20 to -0.50)", "3 answers without a score"):
        assert words in card.replace("\\", ""), words
    assert {"report.html", "reports/summary.md", "reports/evaluation-geneval.json"} <= release.files.keys()


def test_a_validation_after_the_benchmark_keeps_it(artifact: Artifact) -> None:
    report_of(artifact).attach(artifact.path)
    write_pages_again(artifact.path, artifact.digest)
    write_reports(artifact)  # as `validate` does: new reports, then the pages
    write_pages(artifact.path, artifact.digest)
    assert "81.20 (79.00 to 83.40)" in page_of(artifact.path).text


def test_words_of_a_report_stay_words(artifact: Artifact) -> None:
    report_of(artifact, title=MARKS, measured_on=MARKS, notes=(MARKS,)).attach(artifact.path)
    page = page_of(write_pages(artifact.path, artifact.digest).parent)
    assert MARKS in page.text
    assert "script" not in page.tags
    assert "<script" not in (artifact.path / "reports" / "summary.md").read_text()


def test_a_build_that_was_not_validated_has_no_page_yet(built: Callable[[str], Artifact], tmp_path: Path) -> None:
    artifact = built("nf4")
    write_pages_again(artifact.path, artifact.digest)
    assert not (artifact.path / "report.html").exists()


def test_benchmarks_of_another_build_are_not_shown(
    artifact: Artifact, cli: Callable[..., tuple[int, str, str]]
) -> None:
    report_of(artifact, digest="0" * 64).attach(artifact.path)
    with pytest.raises(ArtifactError, match=r"evaluation-geneval.json belongs to another build \(000000000000"):
        write_pages(artifact.path, artifact.digest)
    code, _, err = cli("report", artifact.path)
    assert (code, "run `bagel-compress evaluate` again or remove it" in err) == (2, True)
    report_of(artifact).attach(artifact.path)
    code, out, _ = cli("report", artifact.path)
    assert (code, "report.html" in out) == (0, True)
    parity(artifact, "1" * 64).save(artifact.path)
    with pytest.raises(ArtifactError):
        write_pages_again(artifact.path, artifact.digest)
