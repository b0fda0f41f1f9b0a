"""Exact scores and GenEval's rules against answers and detections made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from bagel_compress.errors import BenchmarkError
from bagel_compress.evaluate.exact import chosen, score_mme, score_mmmu, score_mmvp, yes_or_no
from bagel_compress.evaluate.geneval import Detection, faults, relations
from bagel_compress.evaluate.items import Item
from bagel_compress.evaluate.open_answers import says
from bagel_compress.evaluate.values import Total, Values, difference, figure

OPTIONS = {"A": "a cat", "B": "a dog"}


def question(name: str, category: str, unit: str, answer: str) -> Item:
    return Item(name, category, (), "text", unit, {"answer": answer, "options": OPTIONS})


def test_mme_gives_a_picture_half_for_each_right_answer_and_a_hundred_for_both() -> None:
    items = [question(f"{c}{i}", c, f"{c}/{i // 2}", "yes" if i % 2 else "no") for c in ("color", "text_translation")
             for i in range(4)]  # fmt: skip
    answers = {item.id: "Yes." if item.wanted["answer"] == "yes" else "No" for item in items}
    answers["color0"] = "Yes"  # of the first picture one of two is right
    answers["text_translation3"] = "maybe"
    values = score_mme(items, answers)
    assert values.values["color"] == {"color/0": (50,), "color/1": (200,)}
    assert figure(values, "color").value == 125
    assert [figure(values, n).value for n in ("perception", "cognition", "total")] == [125, 125, 250]


def test_mmvp_counts_pairs() -> None:
    items = [question(str(i), "pairs", f"pair {i // 2}", "AB"[i % 2]) for i in range(4)]
    values = score_mmvp(items, {"0": "A", "1": "(B) a cat", "2": "A. a cat", "3": "It is a dog."})
    assert [figure(values, name).value for name in ("pairs", "single")] == [50, 75]
    assert values.values["pairs"] == {"pair 0": (0,), "pair 1": (100,)}  # "(" is no letter, so the text decides


def test_mmmu_by_subject_and_in_all() -> None:
    items = [question("1", "Art", "", "A"), question("2", "Art", "", "B"), question("3", "Music", "", "A")]
    values = score_mmmu(items, {"1": "A", "2": "a cat", "3": ""})
    assert [figure(values, name).value for name in ("Art", "Music")] == [50, 0]
    assert figure(values, "total").value == pytest.approx(100 / 3)
    items += [Item("4", "Music", (), "text", "", {"accepted": ["0.5", "1/2"]})]
    values = score_mmmu(items, {"1": "A", "2": "a cat", "3": "", "4": "It is .50."})
    figures = {name: figure(values, name).value for name in values.names()}
    assert figures == {"total": 50, "multiple choice": pytest.approx(100 / 3), "open": 100, "Art": 50, "Music": 50}


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("24/7", ["24/7", "3.429"], True),
        ("The ratio is 3.429 to one", ["24/7", "3.429"], True),
        ("The total comes to 1,250 dollars", ["1250"], True),
        ("x = 2.004", ["2"], True),  # two decimals are compared
        ("x = 2.01", ["2"], False),
        ("It is a Trochaic tetrameter.", ["trochaic tetrameter"], True),
        ("so it is 5\nthus 7", ["5"], True),  # every line has a key phrase
        ("the answer is 5", ["15"], False),
        ("sine", ["i"], False),  # one letter needs a space beside it
        ("force i", ["i"], True),
        ("", ["5"], False),
    ],
)
def test_open_answers_are_read_as_mmmu_reads_them(answer: str, accepted: list[str], right: bool) -> None:
    assert says(answer, accepted) == right


@pytest.mark.parametrize(
    ("answer", "letter"), [("B", "B"), (" B.\n", "B"), ("Answer: a dog", "A"), ("the dog is a dog", "B"), ("", "C")]
)
def test_letters_are_read_as_officially(answer: str, letter: str) -> None:
    assert chosen(answer, OPTIONS, "C") == letter


@pytest.mark.parametrize(
    ("answer", "word"), [("Yes", "yes"), ("no.", "no"), ("True", "yes"), ("Well, no", "other"), ("不是", "no")]
)
def test_yes_and_no_are_read_as_officially(answer: str, word: str) -> None:
    assert yes_or_no(answer) == word


def thing(name: str, x: float, y: float, confidence: float = 0.95) -> Detection:
    return Detection(name, (x, y, x + 10, y + 10), confidence)


CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
LEFT = {"include": [DOG, {**CAT, "position": ["left of", 0]}]}
CASES: list[tuple[str, dict[str, Any], list[Detection], bool]] = [
    ("single_object", {"include": [CAT]}, [thing("cat", 0, 0, 0.31)], True),
    ("single_object", {"include": [CAT]}, [thing("cat", 0, 0, 0.29)], False),
    ("two_object", {"include": [CAT, DOG]}, [thing("cat", 0, 0), thing("dog", 30, 0)], True),
    ("two_object", {"include": [CAT, DOG]}, [thing("cat", 0, 0)], False),
    ("counting", {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
     [thing("cat", 0, 0), thing("cat", 20, 0), thing("cat", 40, 0, 0.8)], True),  # a third that is not sure
    ("counting", {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
     [thing("cat", 20 * i, 0) for i in range(3)], False),
    ("colors", {"include": [{**CAT, "color": "red"}]}, [thing("cat", 0, 0)], True),
    ("colors", {"include": [{**CAT, "color": "blue"}]}, [thing("cat", 0, 0)], False),
    ("position", LEFT, [thing("cat", 0, 0), thing("dog", 30, 0)], True),
    ("position", LEFT, [thing("cat", 30, 0), thing("dog", 0, 0)], False),
    ("position", LEFT, [thing("cat", 0, 0)], False),
    ("color_attr", {"include": [{**CAT, "color": "red"}, {**DOG, "color": "blue"}]},
     [thing("cat", 0, 0), thing("dog", 30, 0)], True),
    ("color_attr", {"include": [{**CAT, "color": "blue"}, {**DOG, "color": "red"}]},
     [thing("cat", 0, 0), thing("dog", 30, 0)], False),
]  # fmt: skip


@pytest.mark.parametrize(("tag", "asked", "things", "right"), CASES)
def test_the_six_categories_of_geneval(tag: str, asked: dict[str, Any], things: list[Detection], right: bool) -> None:
    image = Image.new("RGB", (64, 64))

    def colors(image: Image.Image, group: Any) -> list[str]:
        return ["red" if t.name == "cat" else "blue" for t in group]

    found = faults(image, things, {"tag": tag, **asked}, colors)
    assert (found == []) == right, found


def test_relations_need_a_tenth_of_the_sizes_between() -> None:
    assert relations(thing("a", 0, 0), thing("b", 30, 0)) == {"left of"}
    assert relations(thing("a", 0, 30), thing("b", 0, 0)) == {"below"}
    assert relations(thing("a", 0, 0), thing("b", 30, 30)) == {"left of", "above"}
    assert relations(thing("a", 0, 0), thing("b", 2, 0)) == set()


def test_intervals_resample_units_and_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    noise, shift = rng.normal(50, 20, 400), rng.normal(-1, 1, 400)
    theirs = Values({"a": {str(i): (x,) for i, x in enumerate(noise)}}, {"both": Total(("a", "a"), "sum")})
    ours = Values({"a": {str(i): (x + s,) for i, (x, s) in enumerate(zip(noise, shift, strict=True))}}, theirs.totals)
    alone, paired = figure(ours, "a"), difference(ours, theirs, "a")
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * 20 / 20, rel=0.15)
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * 1 / 20, rel=0.15)
    assert paired.high < 0
    assert figure(ours, "both").value == pytest.approx(2 * alone.value)
    repeated = Values({"a": {u: v * 4 for u, v in ours.values["a"].items()}}, {})
    assert figure(repeated, "a").low == pytest.approx(alone.low)  # four equal pictures of a prompt say no more than one
    with pytest.raises(BenchmarkError, match="1 of 400 items in common"):
        difference(ours, Values({"a": {"0": (1,)}}, {}), "a")


def test_a_difference_is_over_the_units_that_both_runs_have() -> None:
    """Each run may have left out a few: pictures that did not open, answers without a score."""
    units = {str(i): (float(i % 7),) for i in range(200)}
    ours = Values({"a": {u: (v[0] + 1,) for u, v in units.items() if u != "3"}}, {})
    theirs = Values({"a": {u: v for u, v in units.items() if u not in ("5", "6")}}, {})
    found = difference(ours, theirs, "a")
    assert [found.value, found.low, found.high] == pytest.approx([1, 1, 1])
    assert found.units == 197
    few = Values({"a": {u: v for u, v in units.items() if int(u) > 8}}, {})
    with pytest.raises(BenchmarkError, match="191 of 199 items in common"):
        difference(ours, few, "a")
    with pytest.raises(BenchmarkError, match="0 of 199 items in common"):
        difference(ours, Values({"b": units}, {}), "a")
