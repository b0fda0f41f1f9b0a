"""MME, MMMU and MMVP scored exactly, by the rules of InternVL2's scripts. No judge, no model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from bagel_compress.evaluate.items import Item
from bagel_compress.evaluate.open_answers import says
from bagel_compress.evaluate.values import Total, Values

MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

Answers = Mapping[str, str]  # item id -> what the model said


def score_mme(items: Sequence[Item], answers: Answers) -> Values:
    """Per picture: percent of its two questions that are right, and 100 more if both are. A subtask has at most 200.

    `perception` (10 subtasks, 2000), `cognition` (4, 800) and `total` are sums of the subtasks' averages.
    """
    values: dict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)
    for category, unit, pair in _pairs(items):
        right = [yes_or_no(answers[item.id]) == item.wanted["answer"] for item in pair]
        values[category][unit] = (100 * sum(right) / 2 + 100 * all(right),)
    totals = {
        "perception": Total(tuple(c for c in values if c in MME_PERCEPTION), "sum"),
        "cognition": Total(tuple(c for c in values if c in MME_COGNITION), "sum"),
        "total": Total(tuple(values), "sum"),
    }
    return Values(values, {name: total for name, total in totals.items() if total.categories})


def score_mmvp(items: Sequence[Item], answers: Answers) -> Values:
    """`pairs`: percent of pairs of pictures answered right on both; `single`: percent of answers that are right."""
    values: dict[str, dict[str, tuple[float, ...]]] = {"pairs": {}, "single": {}}
    for _, unit, pair in _pairs(items):
        right = [100.0 * (chosen(answers[i.id], i.wanted["options"]) == i.wanted["answer"]) for i in pair]
        values["pairs"][unit] = (min(right),)
        values["single"][unit] = tuple(right)
    return Values(values, {})


def score_mmmu(items: Sequence[Item], answers: Answers) -> Values:
    """Percent of questions answered right: by subject, of those with options and the open ones, `total` over all."""
    values: dict[str, dict[str, tuple[float, ...]]] = {"total": {}, "multiple choice": {}, "open": {}}
    for item in items:
        answer, wanted = answers[item.id], item.wanted
        is_open = "accepted" in wanted
        right = (
            says(answer, wanted["accepted"]) if is_open else chosen(answer, wanted["options"], "C") == wanted["answer"]
        )
        for category in ("total", "open" if is_open else "multiple choice", item.category):
            values.setdefault(category, {})[item.cluster] = (100.0 * right,)
    return Values({category: units for category, units in values.items() if units}, {})


def yes_or_no(answer: str) -> str:
    """yes, no or other: what an answer says in its first four letters."""
    said = answer.replace("\n", "").replace("不是", "no").replace("是", "yes").replace("否", "no").lower()
    said = re.sub("[\u4e00-\u9fa5]", "", said.replace("true", "yes").replace("false", "no"))
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


def chosen(answer: str, options: Mapping[str, str], if_empty: str = "") -> str:
    """The letter of an answer: its first character if that is one, else the first option whose text it holds."""
    said = answer.strip()
    if not said:
        return if_empty
    if len(said) == 1 or said[0] in options:
        return said[0]
    return next((letter for letter, text in options.items() if text in said), said)


def _pairs(items: Sequence[Item]) -> list[tuple[str, str, list[Item]]]:
    """Units that are whole; one whose other half was damaged is left out."""
    units: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        units[item.category, item.cluster].append(item)
    return [(category, unit, pair) for (category, unit), pair in units.items() if len(pair) == 2]
