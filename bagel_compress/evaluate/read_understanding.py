"""MME, MMMU and MMVP: from their files to items. Prompts are those of InternVL2's scripts, which the model follows."""

from __future__ import annotations

import ast
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bagel_compress.errors import BenchmarkError
from bagel_compress.evaluate.items import (
    BenchmarkItems,
    Item,
    ItemPicture,
    existing_picture,
    parquet_rows,
    read_lines,
    required,
    text_of,
)

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLM"


def read_mme(data: Path) -> BenchmarkItems:
    """questions/SUBTASK.txt (tab-separated) and MME_Benchmark_release_version/SUBTASK[/images]/NAME."""
    questions = required(data, "questions", "mme", "a folder of one .txt per subtask")
    pictures = required(data, "MME_Benchmark_release_version", "mme", "the pictures")
    reading = BenchmarkItems(questions)
    for file in sorted(questions.glob("*.txt")):
        for number, line in enumerate(read_lines(file)):
            try:
                fields = line.strip().split("\t")
                if len(fields) < 3 or fields[2].strip().lower() not in ("yes", "no"):
                    raise BenchmarkError(f"found {line[:60]!r}, expected picture, question and yes or no by tabs")
                name, question, answer = fields[:3]
                turns = (_mme_picture(pictures / file.stem, name), f"{question} {SHORT}")
                pair, wanted = f"{file.stem}/{number // 2}", {"answer": answer.strip().lower()}
                reading.add(Item(f"{file.stem}/{number}", file.stem, turns, "text", pair, wanted))
            except BenchmarkError as error:
                reading.skip(f"{file.name} line {number + 1}", error)
    return reading.checked()


def _mme_picture(folder: Path, name: str) -> ItemPicture:
    try:
        return existing_picture(folder, name)
    except BenchmarkError:
        return existing_picture(folder, f"images/{name}")


def read_mmvp(data: Path) -> BenchmarkItems:
    """Questions.csv and "MMVP Images"/INDEX.jpg; two questions in a row are a pair."""
    table = required(data, "Questions.csv", "mmvp", "the questions")
    folder = required(data, "MMVP Images", "mmvp", "the pictures")
    reading = BenchmarkItems(table)
    for number, row in enumerate(csv.DictReader(read_lines(table))):
        try:
            index = text_of(row, "lndex" if "lndex" in row else "Index")
            first, found, second = text_of(row, "Options").partition("(b)")
            if not found:
                raise BenchmarkError(f"Options is {row['Options']!r}, expected (a) ... (b) ...")
            options = {"A": first.replace("(a)", "").strip(), "B": second.strip()}
            answer = text_of(row, "Correct Answer").strip().strip("()").upper()
            turns = (existing_picture(folder, f"{index}.jpg"), _asked(text_of(row, "Question"), options, LETTER))
            wanted = {"answer": answer, "options": options}
            reading.add(Item(index, "pairs", turns, "text", f"pair {number // 2}", wanted))
        except BenchmarkError as error:
            reading.skip(f"{table.name} row {number + 1}", error)
    return reading.checked()


def read_mmmu(data: Path) -> BenchmarkItems:
    """SUBJECT/validation-*.parquet, questions with options and open ones."""
    files = sorted(data.glob("*/validation-*.parquet"))
    if not files:
        required(data, "Art/validation-00000-of-00001.parquet", "mmmu", "and so on, one folder per subject")
    reading = BenchmarkItems(data)
    for name, row in parquet_rows(files):
        try:
            reading.add(_mmmu_item(row))
        except (BenchmarkError, ValueError, SyntaxError) as error:
            reading.skip(name, error)
    return reading.checked()


def _mmmu_item(row: Mapping[str, Any]) -> Item:
    kind = row.get("question_type")
    if kind not in ("multiple-choice", "open"):
        raise BenchmarkError(f"question_type is {kind!r}, expected multiple-choice or open")
    choices = ast.literal_eval(text_of(row, "options")) if kind == "multiple-choice" else []
    if not isinstance(choices, list) or (kind != "open" and not 0 < len(choices) <= len(LETTERS)):
        raise BenchmarkError(f"options is {row['options']!r}, expected a list of texts")
    options = {letter: str(choice).strip() for letter, choice in zip(LETTERS, choices, strict=False)}
    pictures = [row.get(f"image_{i}") for i in range(1, 8)]
    found = [
        ItemPicture(picture["bytes"], 2 if i == 0 else 1)  # the official script doubles the first
        for i, picture in enumerate(pictures)
        if picture is not None and picture.get("bytes")
    ]
    name = text_of(row, "id")
    subject = "_".join(name.split("_")[1:-1]) or "all"
    answer, question = text_of(row, "answer"), text_of(row, "question").strip()
    if kind == "open":
        return Item(name, subject, (*found, f"{question}\n{SHORT}"), "text", "", {"accepted": _accepted(answer)})
    wanted = {"answer": answer, "options": options}
    return Item(name, subject, (*found, _asked(question, options, LETTER)), "text", "", wanted)


def _accepted(answer: str) -> list[str]:
    """Some rows hold one answer, others a list of them, as text."""
    if not answer.startswith("["):
        return [answer]
    listed = ast.literal_eval(answer)
    return [str(one) for one in listed] if isinstance(listed, list) else [answer]


def _asked(question: str, options: Mapping[str, str], prompt: str) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items()), prompt])
