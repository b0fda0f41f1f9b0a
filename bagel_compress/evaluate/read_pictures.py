"""Benchmarks that draw and edit: from their files to items, and where their official scorers look for the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bagel_compress.errors import BenchmarkError
from bagel_compress.evaluate.items import (
    BenchmarkItems,
    Item,
    ItemPicture,
    existing_picture,
    parquet_rows,
    read_json,
    read_lines,
    required,
    text_of,
)

WISE_FILES = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")
WISE_SCIENCE = {7: "Biology", 8: "Physics", 9: "Chemistry"}  # prompts 701 to 800, 801 to 900, 901 to 1000


def read_geneval(data: Path, pictures: int, file: str = "evaluation_metadata.jsonl") -> BenchmarkItems:
    """A JSONL of tag, include, exclude and prompt -> NNNNN/metadata.jsonl and NNNNN/samples/NNNNN.png."""
    path = required(data, file, "geneval", "the prompts")
    reading = BenchmarkItems(path)
    for number, line in enumerate(read_lines(path)):
        try:
            row = json.loads(line)
            prompt, tag = text_of(row, "prompt"), text_of(row, "tag")
            if not isinstance(row.get("include"), list):
                raise BenchmarkError("it has no list `include`")
        except (ValueError, AttributeError, RecursionError, BenchmarkError) as error:
            reading.skip(f"line {number + 1}", error)
            continue
        folder = f"{number:05}"
        beside = {f"{folder}/metadata.jsonl": json.dumps(row)}
        for i in range(pictures):
            reading.add(Item(f"{folder}/samples/{i:05}", tag, (prompt,), "image", folder, row, beside))
    return reading.checked()


def read_wise(data: Path) -> BenchmarkItems:
    """Three lists of Prompt, Explanation, Category, Subcategory, prompt_id -> PROMPT_ID.png."""
    files = [required(data, name, "wise", "a third of the prompts") for name in WISE_FILES]
    reading = BenchmarkItems(data)
    for file in files:
        for number, row in enumerate(_rows(file)):
            with_row(reading, f"{file.name} entry {number + 1}", _wise_item, row, file.name)
    return reading.checked()


def _wise_item(row: Mapping[str, Any], file: str) -> Item:
    number = row.get("prompt_id")
    if not isinstance(number, int):
        raise BenchmarkError(f"prompt_id is {number!r}, expected a number")
    if file == WISE_FILES[0]:
        category = "Cultural"
    elif file == WISE_FILES[1]:
        category = "Time" if row.get("Subcategory") in ("Longitudinal time", "Horizontal time") else "Space"
    else:
        category = WISE_SCIENCE.get((number - 1) // 100, "Science")
    return Item(str(number), category, (text_of(row, "Prompt"),), wanted=row)


def read_prompt_files(data: Path) -> BenchmarkItems:
    """NAME.txt, one prompt each -> NAME.png."""
    reading = BenchmarkItems(data)
    for file in sorted(data.glob("*.txt")):
        lines = read_lines(file)
        if lines:
            reading.add(Item(file.stem, "all", ("\n".join(lines).strip(),)))
        else:
            reading.skip(file.name, "it is empty")
    return reading.checked()


def read_gedit(data: Path) -> BenchmarkItems:
    """data/*.parquet, the English half -> fullset/TASK/en/KEY.png and KEY_SRCIMG.png."""
    files = sorted(data.glob("data/*.parquet"))
    if not files:
        required(data, "data/train-00000-of-00001.parquet", "gedit", "the data set")
    reading = BenchmarkItems(data)
    for name, row in parquet_rows(files):
        if row.get("instruction_language") == "en":
            with_row(reading, name, _gedit_item, row)
    return reading.checked()


def _gedit_item(row: Mapping[str, Any]) -> Item:
    place = f"fullset/{text_of(row, 'task_type')}/en/{text_of(row, 'key')}"
    found = row.get("input_image") or {}
    if not found.get("bytes"):
        raise BenchmarkError("input_image holds no picture")
    picture = ItemPicture(found["bytes"])
    wanted = {"instruction": text_of(row, "instruction")}
    return Item(place, row["task_type"], (picture, row["instruction"]), wanted=wanted,
                beside={f"{place}_SRCIMG.png": picture})  # fmt: skip


def read_imgedit(data: Path) -> BenchmarkItems:
    """singleturn/singleturn.json: key -> id, prompt, edit_type -> KEY.png."""
    file = required(data, "singleturn/singleturn.json", "imgedit", "the edits")
    rows, reading = read_json(file), BenchmarkItems(file)
    if not isinstance(rows, dict):
        raise BenchmarkError(f"{file} holds a {type(rows).__name__}, expected key -> id, prompt, edit_type.")

    def item(key: str, row: Mapping[str, Any]) -> Item:
        turns = (existing_picture(file.parent, text_of(row, "id")), text_of(row, "prompt"))
        return Item(key, text_of(row, "edit_type"), turns, wanted=row)

    for key, row in rows.items():
        with_row(reading, f"entry {key}", item, key, row)
    return reading.checked()


def read_kris(data: Path) -> BenchmarkItems:
    """CATEGORY/annotation.json: number -> ori_img (one or several), gt_img, ins_en, explain_en -> CATEGORY/N.png."""
    files = sorted(data.glob("*/annotation.json"))
    if not files:
        required(data, "count_change/annotation.json", "kris", "and so on, one folder per category")
    reading = BenchmarkItems(data)

    def item(folder: Path, number: str, row: Mapping[str, Any]) -> Item:
        names = row.get("ori_img")
        pictures = [existing_picture(folder, n) for n in (names if isinstance(names, list) else [names])]
        wanted = dict(row)
        if isinstance(row.get("gt_img"), str):
            wanted["truth"] = existing_picture(folder, row["gt_img"])
        turns: tuple[str | ItemPicture, ...] = (*pictures, text_of(row, "ins_en"))
        return Item(f"{folder.name}/{number}", folder.name, turns, wanted=wanted)

    for file in files:
        for number, row in read_json(file).items():
            with_row(reading, f"{file.parent.name} {number}", item, file.parent, number, row)
    return reading.checked()


def read_rise(data: Path) -> BenchmarkItems:
    """datav2_total_w_subtask.json: index, category, instruction, image, ... -> CATEGORY/INDEX.png."""
    file = required(data, "datav2_total_w_subtask.json", "rise", "the edits")
    reading = BenchmarkItems(file)

    def item(row: Mapping[str, Any]) -> Item:
        category = text_of(row, "category")
        turns = (existing_picture(data, row.get("image")), text_of(row, "instruction"))
        wanted = dict(row)
        if isinstance(row.get("reference_img"), str):
            wanted["truth"] = existing_picture(data, row["reference_img"])
        return Item(f"{category}/{row.get('index')}", category, turns, wanted=wanted)

    for number, row in enumerate(_rows(file)):
        with_row(reading, f"entry {number + 1}", item, row)
    return reading.checked()


def read_edit_list(data: Path) -> BenchmarkItems:
    """data.jsonl: id, image (or a list of images), prompt -> ID.png."""
    file = required(data, "data.jsonl", "intelligentbench", "the edits")
    reading = BenchmarkItems(file)

    def item(line: str) -> Item:
        row = json.loads(line)
        names = row.get("image")
        pictures = [existing_picture(data, n) for n in (names if isinstance(names, list) else [names])]
        return Item(str(row.get("id")), "all", (*pictures, text_of(row, "prompt")), wanted=row)

    for number, line in enumerate(read_lines(file)):
        with_row(reading, f"line {number + 1}", item, line)
    return reading.checked()


def with_row(reading: BenchmarkItems, name: str, make: Callable[..., Item], *args: Any) -> None:
    """Adds what `make` reads, or counts the row as damaged."""
    try:
        reading.add(make(*args))
    except (BenchmarkError, ValueError, AttributeError, RecursionError) as error:
        reading.skip(name, error)


def _rows(file: Path) -> Sequence[Any]:
    rows = read_json(file)
    if not isinstance(rows, list):
        raise BenchmarkError(f"{file} holds a {type(rows).__name__}, expected a list.")
    return rows
