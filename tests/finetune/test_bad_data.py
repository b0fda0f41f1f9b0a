"""Bad data from the command line: a few bad rows are skipped, counted and named; more than 1 % ends in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune_data as data
import pytest
import yaml

pytest.importorskip("pyarrow")

Cli = Callable[..., tuple[int, str, str]]
LAYER = {"component": "llm", "kind": "linear", "layer": "0"}


def train(cli: Cli, folder: Path, group: dict[str, Any], **more: Any) -> tuple[int, str, str]:
    settings = {"model": str(data.NANO), "data": [group], "steps": 2, "tokens": 300, "dtype": "float32"}
    text = yaml.safe_dump(settings | {"lora": {"rank": 1, "match": [LAYER]}} | more)
    (folder / "c.yaml").write_text(text)
    return cli("finetune", folder / "c.yaml", "--out", folder / "run")


def test_few_bad_rows_are_skipped_counted_and_named(cli: Cli, tmp_path: Path) -> None:
    folder = data.vlm(tmp_path / "vlm", 1)
    (folder / "bad.png").write_bytes((folder / "0.png").read_bytes()[:50])
    words = [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "no"}]
    bad = ["{not json", json.dumps({"image": "bad.png", "conversations": words}),
           json.dumps({"conversations": [*words, {"from": "human", "value": "what " * 900}]})]  # fmt: skip
    lines = [json.dumps({"conversations": words})] * 297
    (folder / "data.jsonl").write_text("\n".join(lines + bad) + "\n")
    group = {"kind": "vlm", "path": str(folder), "jsonl": str(folder / "data.jsonl"), "drop_text": 0.0}
    code, _, err = train(cli, tmp_path, group, tokens=900, steps=6)  # goes through all 300 rows
    assert code == 0, err
    assert f"3 rows were skipped; {tmp_path / 'run' / 'damaged.txt'} names them" in err
    named = sorted((tmp_path / "run" / "damaged.txt").read_text().splitlines())
    assert [line.split(": ", 2)[1] for line in named] == [f"data.jsonl line {n}" for n in (298, 299, 300)]
    for line, why in zip(named, ("it is not JSON", "bad.png does not open", "a packed batch holds 900"), strict=True):
        assert why in line
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["damaged_rows"] == 3


def _bad_row(kind: str, folder: Path) -> tuple[dict[str, Any], str]:
    """A data group with one bad row (or file) of twelve or fewer, and what the error says of it."""
    image, caption = data.png(data.render(data.sample_scene(data.np.random.default_rng(0)))), "a red circle"
    columns: dict[str, dict[str, list[object]]] = {
        "picture": {"image": [image, image[:60]], "captions": [caption, caption]},
        "no picture": {"image": [image, None], "captions": [caption, caption]},
        "no caption": {"image": [image, image], "captions": [caption, "{}"]},
        "too long": {"image": [image, image], "captions": [caption, "very " * 500 + caption]},
        "half a character": {"image": [image, image], "captions": [caption, json.dumps(["a \ud800 circle"])]},
    }
    says = {"picture": "its picture does not open", "no picture": "its picture is missing",
            "no caption": "it has no caption", "too long": "tokens long, a packed batch holds 300",
            "half a character": "a text of it holds half a character"}  # fmt: skip
    if kind in columns:
        data.write_parquet(folder / "a.parquet", columns[kind])
        return {"kind": "t2i", "path": str(folder)}, f"a.parquet row group 0 row 1: .*{says[kind]}"
    if kind == "row group":
        data.t2i(folder)
        content = bytearray((folder / "00001.parquet").read_bytes())
        content[4:2000] = b"\xff" * 1996
        (folder / "00001.parquet").write_bytes(content)
        return {"kind": "t2i", "path": str(folder)}, r"00001.parquet row group 0 row \d: its row group cannot be read"
    if kind == "footer":
        data.edit(folder)
        (folder / "edits.parquet").write_bytes((folder / "edits.parquet").read_bytes()[:-9])
        info = str(folder / "parquet_info.json")
        return {"kind": "edit", "path": str(folder), "info": info}, "edits.parquet is no readable parquet file"
    data.captioned(folder)
    if kind == "caption file":
        (folder / "3.txt").unlink()
        return {"kind": "folder", "path": str(folder)}, r"3.png has no caption"
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "x"}) + "\n{half a l\n")
    return {"kind": "folder", "path": str(folder)}, "metadata.jsonl line 2: it is not JSON with file_name and text"


@pytest.mark.parametrize(
    "kind",
    [
        "picture",
        "no picture",
        "no caption",
        "too long",
        "half a character",
        "row group",
        "footer",
        "caption file",
        "listed",
    ],
)
def test_many_bad_rows_end_in_one_sentence(cli: Cli, tmp_path: Path, kind: str) -> None:
    group, says = _bad_row(kind, tmp_path / "data")
    code, out, err = train(cli, tmp_path, group)
    assert (code, out) == (2, "")
    (line,) = err.strip().splitlines()
    import re

    assert re.search(says, line), line
    assert "Traceback" not in err
