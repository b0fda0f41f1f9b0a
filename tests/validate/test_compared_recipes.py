"""Builds side by side: numbers, paired intervals and the contact sheet are those of the builds."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from bagel_compress.io.packaged import find_recipe, resource
from bagel_compress.report import format_chart
from bagel_compress.report.svg import LABEL_HEIGHT, LETTER, WIDTH, scatter
from bagel_compress.run.case import load_cases
from bagel_compress.validation.compare_recipes import Counts, RecipeComparison, compare_recipes
from bagel_compress.validation.recipes_page import render, table

COUNTS = Counts(draw=6, ask=7, edit=4, think=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("family")


@pytest.fixture(scope="module")
def family(folder: Path) -> RecipeComparison:
    cases = load_cases([resource("exports") / "cases" / "nano" / f"{n}.yaml" for n in ("draw_one", "ask_describe")])
    recipes = [find_recipe("nf4-official"), find_recipe("raw")]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = compare_recipes(resource("BAGEL-nano"), recipes, cases, folder, COUNTS, lambda _: None)
        assert torch.get_num_threads() == 2  # it works on one thread, and leaves none of that behind
    finally:
        torch.set_num_threads(before)
    return found


def test_an_untouched_build_equals_the_source_and_a_coded_one_does_not(family: RecipeComparison) -> None:
    coded, raw = family.builds
    assert (coded.name, raw.name) == ("nf4-official", "raw")
    assert raw.psnr == float("inf")
    assert raw.equal_texts == 1.0
    assert raw.scored == family.source
    assert set(raw.differences.values()) == {(0.0, 0.0)}
    assert 20 < coded.psnr < 60
    assert coded.nbytes < 0.4 * raw.nbytes
    assert [t.png for t in coded.scored.tiles] != [t.png for t in family.source.tiles]


def test_the_page_shows_every_picture_under_its_prompt(family: RecipeComparison, folder: Path) -> None:
    assert len(family.columns) == 12
    assert [bool(a.before) for a in family.columns] == [False] * 6 + [True] * 4 + [False] * 2
    page = render("title", family, folder)
    assert len(re.findall(r"<img class='(?:right|wrong)'", page)) == 12 * 3
    assert len(re.findall(r"<img class='input'", page)) == 4
    assert all(a.text in page for a in family.columns)
    wrong = sum(not t.right for s in (family.source, *(b.scored for b in family.builds)) for t in s.tiles)
    assert page.count("<img class='wrong'") == wrong
    alike = re.search(r"on the same prompts as the source: ([^<]*)\.", page)  # a line, and no row of equal scores
    assert alike
    assert "raw" in alike[1]
    assert "nf4-official is here for comparison only" in page
    assert "nf4-official" in table(family)


def test_the_chart_of_formats_joins_rates_of_one_format_only_and_is_the_file_of_the_docs() -> None:
    figures = format_chart.Figures.load()
    curve = [f for f in figures.formats if f.label == "ecq"]
    assert min(f.bits for f in curve) <= 2.5
    assert max(f.bits for f in curve) >= 8
    roundings: dict[str, set[str]] = {}
    for figure in figures.formats:
        roundings.setdefault(figure.label, set()).add(figure.rounding)
    assert sum(found == {"nearest", "gptq"} for found in roundings.values()) >= 8
    [line] = re.findall(r'<polyline points="([^"]*)"', format_chart.section(figures))
    assert len(line.split()) == len(curve)
    assert format_chart.section(figures).count("<title>") == len(figures.formats)
    drawn = Path(__file__).parents[2] / "docs" / "nano_formats.svg"
    assert drawn.read_text(encoding="utf-8") == format_chart.chart_file(figures)
    ElementTree.parse(drawn)


def test_labels_of_a_crowded_chart_do_not_cover_each_other() -> None:
    """Twelve formats, most of them between 9 and 12 GB at errors of one size."""
    rng = np.random.default_rng(3)
    places = rng.uniform((9, 0.02), (12, 0.1), (12, 2))
    points = [(f"recipe-{i}", float(x), float(y)) for i, (x, y) in enumerate(places)]
    drawn = scatter("error", "GB", [*points, ("bf16", 29.2, 0.0)])
    labels = [(float(x), float(y), len(name) * LETTER)
              for x, y, name in re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)">([^<]+)<', drawn)]  # fmt: skip
    assert len(labels) == 13
    for i, (x, y, width) in enumerate(labels):
        assert x >= 0
        assert x + width <= WIDTH
        for other_x, other_y, other_width in labels[:i]:
            assert abs(y - other_y) >= LABEL_HEIGHT - 0.1 or x >= other_x + other_width or other_x >= x + width
