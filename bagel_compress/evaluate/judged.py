"""Benchmarks that a judge scores: what each asks about a picture, and how scores are made of the answers.

The questions' texts are the benchmark's own and are read from the user's copy (Python files are parsed, never run). The
rules are those of the model's official evaluation scripts. Pictures are sent as PNG.
"""

from __future__ import annotations

import ast
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from bagel_compress.errors import BenchmarkError
from bagel_compress.evaluate.benchmarks import BenchmarkInfo
from bagel_compress.evaluate.items import Item, ItemPicture, check_damage, read_json, required
from bagel_compress.evaluate.judge import Judge, JudgeQuestion, judge_all
from bagel_compress.evaluate.values import Total, Values
from bagel_compress.scores.evaluation_report import JudgeUse

Prompts = Mapping[str, str]
Parts = tuple[str | Image.Image | Path, ...]  # of a question
Scores = Mapping[str, Mapping[str, float]]  # name of a question -> its scores
KRIS_GROUPS = {
    "Attribute Perception": (
        "count_change", "color_change", "size_adjustment", "part_completion", "anomaly_correction",
    ),
    "Spatial Perception": ("viewpoint_change", "position_movement"),
    "Temporal Prediction": ("temporal_prediction",),
    "Social Science": ("humanities", "practical_knowledge"),
    "Natural Science": ("biology", "chemistry", "geography", "medicine", "mathematics", "physics"),
    "Logical Reasoning": ("abstract_reasoning", "rule-based_reasoning"),
    "Instruction Decomposition": ("multi-element_composition", "multi-instruction_execution"),
}  # fmt: skip
KRIS_KNOWLEDGE = ("Social Science", "Natural Science", "Logical Reasoning")
_NUMBER = r"([0-9]{1,3})(?![0-9])"  # of an answer: one with more digits is no score
WISE_SCORES = ("consistency", "realism", "aesthetic quality")


def score_judged(
    info: BenchmarkInfo, items: Sequence[Item], picture: Callable[[Item], Path], data: Path, out: Path, judge: Judge
) -> tuple[Values, JudgeUse]:
    """Asks the judge about every picture (or reads what it said before) and scores.

    Raises BenchmarkError if the prompts are missing, the judge refuses, or it answers too often without a score.
    """
    prompts = read_prompts(required(data, info.judge_prompts, info.name, "the judge's prompts"))
    ask, score = _PROTOCOLS[info.name]
    questions = {item.id: ask(item, picture(item), prompts) for item in items}
    asked = [question for own in questions.values() for question in own]
    verdicts = judge_all(judge, asked, out / "judge")
    check_damage(verdicts.unreadable, len(asked), f"the judge {judge.model}", "answers")
    whole = [item for item in items if all(question.name in verdicts.scores for question in questions[item.id])]
    cost = None
    if judge.prices is not None:
        cost = (verdicts.prompt_tokens * judge.prices[0] + verdicts.completion_tokens * judge.prices[1]) / 1e6
    use = JudgeUse(
        model=judge.model, host=judge.host, answers=verdicts.answers, unreadable=len(verdicts.unreadable),
        prompt_tokens=verdicts.prompt_tokens, completion_tokens=verdicts.completion_tokens, cost=cost,
    )  # fmt: skip
    return score(whole, verdicts.scores), use


def read_prompts(path: Path) -> Prompts:
    """Name -> text: of a JSON object, or of the strings and f-strings of a Python file, which is not run.

    The expressions of an f-string become {Prompt} for `data['Prompt']`; one that is not assigned is called text0 ...
    """
    if path.suffix == ".json":
        found = read_json(path)
        if not isinstance(found, dict):
            raise BenchmarkError(f"{path} holds a {type(found).__name__}, expected name -> prompt.")
        return {name: str(text) for name, text in found.items()}
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise BenchmarkError(f"{path} is not readable Python ({error}); download it again.") from None
    prompts: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (text := _text(node.value)):
            prompts[node.targets[0].id] = text
    for part in ast.walk(tree):
        if isinstance(part, ast.JoinedStr) and (text := _text(part)):
            prompts[f"text{len(prompts)}"] = text
    return prompts


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if not isinstance(node, ast.JoinedStr):
        return ""
    parts = []
    for value in node.values:
        if isinstance(value, ast.FormattedValue):
            inner = value.value
            key = inner.slice if isinstance(inner, ast.Subscript) else None
            parts.append("{" + (str(key.value) if isinstance(key, ast.Constant) else ast.unparse(inner)) + "}")
        else:
            parts.append(_text(value))
    return "".join(parts)


def _filled(prompts: Prompts, name: str, **words: object) -> str:
    """A prompt with its {words} put in; other braces stay, and {{ }} are single ones, as str.format has it."""
    if name not in prompts:
        raise BenchmarkError(f"the judge's prompts hold no {name}; expected the file of the official scripts.")
    text = prompts[name]
    pattern = "|".join(re.escape("{" + word + "}") for word in words)
    filled = re.sub(pattern, lambda m: str(words[m[0][1:-1]]), text) if words else text
    return filled.replace("{{", "{").replace("}}", "}")


def _pictures(item: Item) -> list[Image.Image]:
    return [turn.open() for turn in item.turns if isinstance(turn, ItemPicture)]


def _instruction(item: Item) -> str:
    return next(turn for turn in item.turns if isinstance(turn, str))


def _field(name: str, key: str, low: int, high: int) -> Callable[[str], Mapping[str, float] | None]:
    """Reads {"key": 3} or `key: 3` or, last, the first n/5; None if the number is out of its range."""
    patterns = (rf'"?{key}"?\s*[:\uff1a]\s*"?{_NUMBER}', rf"\b{_NUMBER}\s*(?:/|out of)\s*{high}\b")

    def read(answer: str) -> Mapping[str, float] | None:
        for pattern in patterns:
            if (match := re.search(pattern, answer, re.IGNORECASE)) and low <= int(match[1]) <= high:
                return {name: float(match[1])}
        return None

    return read


# --- WISE -------------------------------------------------------------------------------------------------------------


def _ask_wise(item: Item, drawn: Path, prompts: Prompts) -> list[JudgeQuestion]:
    named = [n for n, text in prompts.items() if "{Prompt}" in text and "{Explanation}" in text]
    name = named[0] if named else "text with {Prompt} and {Explanation}"
    text = _filled(prompts, name, Prompt=item.wanted["Prompt"], Explanation=item.wanted.get("Explanation", ""))
    return [JudgeQuestion(item.id, (text, drawn), _read_wise)]


def _read_wise(answer: str) -> Mapping[str, float] | None:
    found = re.findall(
        r"\*{0,2}(Consistency|Realism|Aesthetic Quality)\*{0,2}\s*[:\uff1a]?\s*\*{0,2}\s*(\d)", answer, re.I
    )
    scores = {name.lower(): float(value) for name, value in found}
    return scores if set(scores) == set(WISE_SCORES) and max(scores.values()) <= 2 else None


def _score_wise(items: Sequence[Item], scores: Scores) -> Values:
    """WiScore: 0.7 consistency + 0.2 realism + 0.1 aesthetic quality, over 2; `overall` is the categories' average."""
    values: dict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)
    for item in items:
        c, r, a = (scores[item.id][name] for name in WISE_SCORES)
        values[item.category][item.id] = ((0.7 * c + 0.2 * r + 0.1 * a) / 2,)
    return Values(values, {"overall": Total(tuple(values))})


# --- GEdit ------------------------------------------------------------------------------------------------------------


def _ask_gedit(item: Item, drawn: Path, prompts: Prompts) -> list[JudgeQuestion]:
    context = _raw(prompts, "_context_no_delimit")
    rules = (_raw(prompts, "_prompts_0shot_two_image_edit_rule"), _raw(prompts, "_prompts_0shot_tie_rule_SC"))
    semantics = "\n".join([context, *rules]).replace("<instruction>", _instruction(item))
    quality = "\n".join([context, _raw(prompts, "_prompts_0shot_rule_PQ")])
    [source] = _pictures(item)
    with Image.open(drawn) as opened:
        edited = opened.convert("RGB").resize(source.size)
    return [
        JudgeQuestion(f"{item.id}#SC", (source, edited, semantics), _read_vie),
        JudgeQuestion(f"{item.id}#PQ", (edited, quality), _read_vie),
    ]


def _raw(prompts: Prompts, name: str) -> str:
    if name not in prompts:
        raise BenchmarkError(f"the judge's prompts hold no {name}; expected the file of the official scripts.")
    return prompts[name]


def _read_vie(answer: str) -> Mapping[str, float] | None:
    """{"score": [a, b], ...}: the least of them, 0 to 10."""
    match = re.search(r'"?score"?\s*:\s*\[([^\]]*)\]', answer)
    try:
        values = [float(value) for value in match[1].split(",")] if match else []
    except ValueError:
        return None
    return {"score": min(values)} if values and all(0 <= value <= 10 for value in values) else None


def _score_gedit(items: Sequence[Item], scores: Scores) -> Values:
    """By task and over tasks: semantics, quality and `overall`, the root of their product, 0 to 10."""
    values: dict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)
    totals: dict[str, list[str]] = defaultdict(list)
    for item in items:
        semantics, quality = scores[f"{item.id}#SC"]["score"], scores[f"{item.id}#PQ"]["score"]
        found = {"semantics": semantics, "quality": quality, "overall": math.sqrt(semantics * quality)}
        for name, value in found.items():
            category = f"{item.category} {name}"
            values[category][item.id] = (value,)
            if category not in totals[name]:
                totals[name].append(category)
    return Values(values, {name: Total(tuple(categories)) for name, categories in totals.items()})


# --- ImgEdit ----------------------------------------------------------------------------------------------------------


def _ask_imgedit(item: Item, drawn: Path, prompts: Prompts) -> list[JudgeQuestion]:
    text = _raw(prompts, item.category).replace("<edit_prompt>", _instruction(item))
    return [JudgeQuestion(item.id, (text, *_pictures(item), drawn), _read_imgedit)]


def _read_imgedit(answer: str) -> Mapping[str, float] | None:
    """The average of the lines `something: n`, 1 to 5, rounded to hundredths."""
    found = [line.strip().split(": ") for line in answer.splitlines()]
    values = [int(parts[1]) for parts in found if len(parts) == 2 and re.fullmatch(_NUMBER, parts[1])]
    if not values or not all(1 <= value <= 5 for value in values):
        return None
    return {"score": round(sum(values) / len(values), 2)}


def _score_imgedit(items: Sequence[Item], scores: Scores) -> Values:
    values: dict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)
    for item in items:
        for category in (item.category, "overall"):
            values[category][item.id] = (scores[item.id]["score"],)
    return Values(values, {})


# --- KRIS -------------------------------------------------------------------------------------------------------------


def _kris_group(category: str) -> str:
    return next((group for group, categories in KRIS_GROUPS.items() if category in categories), category)


def _ask_kris(item: Item, drawn: Path, prompts: Prompts) -> list[JudgeQuestion]:
    words = {"instruct": _instruction(item), "explanation": item.wanted.get("explain_en", "")}
    words["N"] = str(len(_pictures(item)) + 1)  # the place of the drawn frame, after the given ones
    before: list[str | Image.Image | Path] = []
    for image in _pictures(item):
        before += ["This is the original image:", image]
    after: Parts = ("This is the edited image:", drawn)
    both: Parts = (*before, *after)
    kind = {"temporal_prediction": "_temporal", "multi-element_composition": "_multi"}.get(item.category, "")
    asked: dict[str, Parts] = {
        "consistency": (_filled(prompts, f"prompt_consist{kind}", **words), *both),
        "quality": (_filled(prompts, "prompt_quality"), *after),
    }
    if _kris_group(item.category) in KRIS_KNOWLEDGE:  # one question, two scores
        dual = JudgeQuestion(
            f"{item.id}#dual", (_filled(prompts, "prompt_dual_evaluation", **words), *both), _read_dual
        )
        return [*_kris_questions(item, asked), dual]
    name = f"prompt_instruction{kind}" if kind else "prompt_instruction_following"
    truth: Parts = ()
    if item.category == "viewpoint_change" and "truth" in item.wanted:
        name, truth = "prompt_view_instruction_following", ("This is the ground truth:", item.wanted["truth"].open())
    asked["instruction"] = (_filled(prompts, name, **words), *both, *truth)
    return _kris_questions(item, asked)


def _kris_questions(item: Item, asked: Mapping[str, Parts]) -> list[JudgeQuestion]:
    return [JudgeQuestion(f"{item.id}#{n}", parts, _field(n, f"{n}_score", 1, 5)) for n, parts in asked.items()]


def _read_dual(answer: str) -> Mapping[str, float] | None:
    found = {n: _field(n, f"{n}_score", 1, 5)(answer) for n in ("instruction", "knowledge")}
    return {n: value[n] for n, value in found.items() if value} if all(found.values()) else None


def _score_kris(items: Sequence[Item], scores: Scores) -> Values:
    """Scores of 1 to 5 as 0 to 100; averages of all of them by group and `overall`."""
    values: dict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)
    for item in items:
        own = [(value - 1) * 25 for name, found in scores.items() if name.rpartition("#")[0] == item.id
               for value in found.values()]  # fmt: skip
        for category in (_kris_group(item.category), "overall"):
            values[category][item.id] = tuple(own)
    return Values(values, {})


# --- RISE -------------------------------------------------------------------------------------------------------------


def _ask_rise(item: Item, drawn: Path, prompts: Prompts) -> list[JudgeQuestion]:
    row, words = item.wanted, {"instruct": _instruction(item), "reference": item.wanted.get("reference", "")}
    truth = row["truth"].open() if "truth" in row else None
    before, with_before = (_pictures(item)[0] if truth is None else truth), truth is not None
    consistency, quality = "prompt_consist", "prompt_generation"
    if item.category == "spatial_reasoning":
        consistency, quality = "prompt_spatial_cons", "prompt_spatial_qual"
        with_before = truth is not None or bool(row.get("reasoning_img"))
        reasoning = "prompt_spatial_ref_w_input" if with_before else "prompt_spatial_ref"
        reasoning = "prompt_spatial_ref_img" if truth is not None else reasoning
    elif item.category == "logical_reasoning":
        quality = ""
        if row.get("reference_txt"):
            words["reference"] = row["reference_txt"]
            before, with_before = _pictures(item)[0], False
            consistency, reasoning = "prompt_logical_cons_ans", "prompt_logical_txt"
        else:
            consistency = "prompt_logical_cons"
            reasoning = "prompt_logical_img_wo_q" if row.get("reasoning_wo_ins") else "prompt_logical_img"
    else:
        before, with_before = _pictures(item)[0], truth is not None and bool(row.get("reasoning_img"))
        reasoning = "prompt_reasoning_w_input" if with_before else "prompt_reasoning"
    asked: dict[str, Parts] = {
        "reasoning": (_filled(prompts, reasoning, **words), *([before] if with_before else []), drawn)
    }
    if not row.get("consistency_free"):
        asked["consistency"] = (_filled(prompts, consistency, **words), before, drawn)
    if quality:
        asked["quality"] = (_filled(prompts, quality), drawn)
    return [JudgeQuestion(f"{item.id}#{name}", parts, _read_final) for name, parts in asked.items()]


def _read_final(answer: str) -> Mapping[str, float] | None:
    """`Final Score: n` (bold or not), 1 to 5."""
    match = re.search(rf"Final Scores?\W*{_NUMBER}", answer, re.IGNORECASE)
    return {"score": float(match[1])} if match and 1 <= int(match[1]) <= 5 else None


def _score_rise(items: Sequence[Item], scores: Scores) -> Values:
    """`accuracy`: percent of edits with full marks everywhere; and the weighted score as 0 to 100, by category."""
    values: dict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)
    for item in items:
        reasoning = scores[f"{item.id}#reasoning"]["score"]
        marks = {n: scores[f"{item.id}#{n}"]["score"] for n in ("consistency", "quality") if f"{item.id}#{n}" in scores}
        if item.category == "logical_reasoning":
            score = 0.3 * marks.get("consistency", reasoning) + 0.7 * reasoning
        elif "consistency" in marks:
            score = 0.3 * marks["consistency"] + 0.5 * reasoning + 0.2 * marks["quality"]
        else:
            score = 0.2 * marks["quality"] + 0.8 * reasoning
        if reasoning == 1:
            score = max(1.0, score / 2)
        # as officially: an edit whose consistency is not asked for never has full marks
        full = "consistency" in marks and reasoning == 5 and all(mark == 5 for mark in marks.values())
        values["accuracy"][item.id] = (100.0 * full,)
        for category in (f"{item.category} score", "score"):
            values[category][item.id] = ((score - 1) * 25,)
    return Values(values, {})


_PROTOCOLS: Mapping[str, tuple[Callable[..., list[JudgeQuestion]], Callable[..., Values]]] = {
    "wise": (_ask_wise, _score_wise),
    "gedit": (_ask_gedit, _score_gedit),
    "imgedit": (_ask_imgedit, _score_imgedit),
    "kris": (_ask_kris, _score_kris),
    "rise": (_ask_rise, _score_rise),
}
