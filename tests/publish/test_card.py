"""The card: the Hub's own parser reads it, hostile names stay names, numbers are those of the reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hub import Hub
from huggingface_hub import HfApi, ModelCard
from markdown_it import MarkdownIt
from publish_data import BASE, REPO, TOKEN, budget, parity

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs.base import Codec
from bagel_compress.codecs.ecq import Ecq
from bagel_compress.codecs.int8 import Int8
from bagel_compress.codecs.nf4 import Nf4
from bagel_compress.publishing.card_markdown import code, plain
from bagel_compress.publishing.card_sections import Origin, recipe_section
from bagel_compress.publishing.model_card import model_card
from bagel_compress.publishing.release_reports import ReleaseReports, load_reports
from bagel_compress.scores.evaluation_report import EvaluationReport, Score

HOSTILE = [
    "x\n---\nlicense: evil\n---\n# pwned",
    'a"\nbase_model: evil/model',
    "`rm -rf /` | <script>alert(1)</script>",
    "[click](javascript:alert(1)) ![x](http://evil/x.png) **bold** http://evil.example",
    "- item\n1. one\n> quote\n# head\n```\nfence",
    "\u202egnp.exe \x1b[31m \x00",
    "{{ jinja }} ${shell} &lt;b&gt; &#x3c;b&#x3e;",
]


class Tags(HTMLParser):
    """Tags and links of rendered Markdown, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(markdown: str) -> Tags:
    return Tags(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(markdown))


def card_of(artifact: Artifact, origin: Origin | None = None) -> str:
    return model_card(artifact, load_reports(artifact)[0], origin or Origin(REPO, BASE))


def test_front_matter(artifact: Artifact) -> None:
    data = ModelCard(card_of(artifact)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "bagel-mot", "any-to-any")
    assert (data.base_model, data.to_dict()["base_model_relation"]) == (BASE, "quantized")
    assert data.to_dict()["quantized_by"] == "ann"
    assert {"nf4", "4-bit", "bagel"} <= set(data.tags or ())
    assert {(r.metric_type, r.metric_value) for r in data.eval_results or ()} >= {
        ("latent.path", 0.11), ("image.psnr", 24.5),
    }  # fmt: skip


def test_a_build_is_called_by_the_width_of_most_of_its_weights(artifact: Artifact) -> None:
    def tags(codecs: Mapping[str, Codec]) -> set[str]:
        units = {n: u.model_copy(update={"codec": codecs.get(n, codecs[""])}) for n, u in coded.items()}
        other = replace(artifact, manifest=artifact.manifest.model_copy(update={"units": units}))
        return set(ModelCard(card_of(other)).data.tags or ())

    coded = {name: unit for name, unit in artifact.manifest.units.items() if unit.codec.format == "nf4"}
    smallest = min(coded, key=lambda name: artifact.unit(name).numel)
    assert {"nf4", "int8", "4-bit"} <= tags({smallest: Int8(), "": Nf4()})
    assert "8-bit" not in tags({smallest: Int8(), "": Nf4()})
    assert "ecq" in tags({smallest: Int8(), "": Ecq(bits=4.13)})
    assert not {"4-bit", "8-bit"} & tags({smallest: Int8(), "": Ecq(bits=4.13)})


def test_a_lossless_build_is_called_so(built: Callable[[str], Artifact]) -> None:
    card = model_card(built("raw"), ReleaseReports(), Origin(REPO, BASE))
    assert "No weight was changed" in card
    assert "4-bit" not in (ModelCard(card).data.tags or [])


def test_the_numbers_are_those_of_the_reports(artifact: Artifact) -> None:
    worst = min(low for low, _ in artifact.snr().values())
    page = rendered(card_of(artifact).partition("\n---\n")[2])
    for shown in ("0.11", "0.004", "24.5", "8.70 GiB", "8.90 GiB", "11.20 GiB", "0.41 s", "0.79x", "a red | cat",
                  "NVIDIA GeForce RTX 4070", "LPIPS was not measured", artifact.digest, f"{worst:.1f} dB"):  # fmt: skip
        assert shown in page.text, shown
    assert "./reports/t2i_square.png" in page.links
    for title in ("Size", "Memory and speed", "Parity with the reference", "Use it", "Limits and known losses",
                  "Recipe", "Provenance", "Licence and attribution"):  # fmt: skip
        assert title in page.text


def test_what_was_not_measured_is_called_so(artifact: Artifact) -> None:
    report = budget(artifact)
    phases = tuple(p.model_copy(update={"measured": None}) for p in report.phases)
    report.model_copy(update={"phases": phases, "timings": (), "measured_on": None}).save(artifact.path)
    card = card_of(artifact)
    assert "| not measured |" in card
    assert "Speed was not measured." in card


def test_limits_that_do_not_hold_are_shown_on_a_draft(artifact: Artifact) -> None:
    parity(artifact, ok=False).save(artifact.path)
    budget(artifact, ok=False).save(artifact.path)
    assert card_of(artifact).count("**no**") == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    for markdown in (plain(text), f"| {plain(text)} | x |\n| --- | --- |", f"before {code(text)} after", code(text)):
        page = rendered(markdown)
        assert set(page.tags) <= {"p", "table", "thead", "tr", "th", "code"}, (markdown, page.tags)
        assert page.links == []
        assert "\n" not in markdown.partition("\n| ---")[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_source_name(artifact: Artifact, hub: Hub, name: str) -> None:
    """A fine-tune of such a name, asked onto a card: the Hub's check and the parser see our front matter only."""
    path = artifact.path / "manifest.json"
    data = json.loads(path.read_bytes())
    data["source"] |= {"name": name, "revision": name}
    data["recipe"] |= {"summary": name, "card": name}
    path.write_text(json.dumps(data))
    hostile = Artifact.open(artifact.path)
    card = model_card(hostile, ReleaseReports(), Origin(REPO, None), draft=True)
    read = ModelCard(card).data
    assert (read.license, read.base_model) == ("apache-2.0", None)
    page = rendered(card.partition("\n---\n")[2])
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [link for link in page.links if "evil" in link or link.startswith("javascript")]
    assert page.tags.count("h1") == 1
    HfApi(endpoint=hub.url, token=TOKEN)._validate_yaml(card, repo_type="model")


def test_a_base_that_is_no_repository_is_refused_by_the_hub(hub: Hub, artifact: Artifact, tmp_path: Path) -> None:
    card = model_card(artifact, ReleaseReports(), Origin(REPO, "no repo\n---\nx: y"))
    assert ModelCard(card).data.to_dict().keys().isdisjoint({"x"})
    with pytest.raises(ValueError, match="base_model"):
        HfApi(endpoint=hub.url, token=TOKEN)._validate_yaml(card, repo_type="model")


@pytest.mark.parametrize(("words", "fence"), [("plain", 3), ("``", 3), ("```", 4), ("a `````` b ``", 7)])
def test_the_recipe_is_fenced_beyond_its_own_backticks(artifact: Artifact, words: str, fence: int) -> None:
    recipe = artifact.manifest.recipe.model_copy(update={"summary": words + " \u202e", "targets": ("12gb",)})
    section = recipe_section(recipe)
    head, body = section.split("yaml\n", 1)
    assert head == f"## Recipe\n\n{'`' * fence}"
    assert body.endswith(f"\n{'`' * fence}")
    text = body.removesuffix(f"\n{'`' * fence}")
    assert Recipe.parse(text, "card") == recipe
    assert text.startswith("name: ")  # in the order in which recipes are written
    assert "\u202e" not in text  # a character that turns a line around is shown by its number
    for empty in ("null", "[]", "''"):
        assert empty not in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_a_number_of_nothing_is_part_of_the_recipe(artifact: Artifact) -> None:
    recipe = artifact.manifest.recipe.model_copy(update={"budget_gb": 0.0})
    assert "budget_gb: 0.0" in recipe_section(recipe)


def test_benchmarks_say_by_whom_and_on_what(artifact: Artifact) -> None:
    assert "## Benchmarks" not in card_of(artifact)
    figure = {"value": 81.2, "low": 79.0, "high": 83.4, "units": 553}
    report = EvaluationReport(
        benchmark="geneval", title="GenEval", model="nf4", digest=artifact.digest, measured_by="bagel-compress 9.9",
        measured_on="H200, torch 2.11", differs=("a subset of 60 units",), items=240, skipped=(), reference="abc123",
        scores=(
            Score(name="overall", official=82.0, delta=-0.4, delta_low=-1.2, delta_high=0.5, **figure),
            Score(name="counting", **figure),
        ),
    )  # fmt: skip
    report.attach(artifact.path)
    card = card_of(artifact)
    page = rendered(card.partition("\n---\n")[2])
    for shown in ("Benchmarks", "81.20 (79.00 to 83.40)", "-0.40 (-1.20 to +0.50)", "bagel-compress 9.9",
                  "H200, torch 2.11", "not the official run: a subset of 60 units", "abc123"):  # fmt: skip
        assert shown in page.text, shown
    assert "| 81.20 (79.00 to 83.40) | 82 |" in card
    assert "counting" not in page.text
    assert "GenEval were not measured" not in card
    report.model_copy(update={"digest": "0" * 64}).attach(artifact.path)
    reports, faults = load_reports(artifact)
    assert reports.evaluations == ()
    assert any("evaluation-geneval.json belongs to another build" in fault for fault in faults)
