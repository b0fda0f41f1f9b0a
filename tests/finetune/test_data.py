"""Data of each layout becomes the right examples; streams repeat; what is damaged is skipped, counted and named."""

from __future__ import annotations

import json
from pathlib import Path

import finetune_data as data
import numpy as np
import pytest

pytest.importorskip("pyarrow")

from bagel_compress.errors import FinetuneError
from bagel_compress.finetune.config import DataGroup, FinetuneConfig
from bagel_compress.finetune.example import PicturePart, RowError, TextPart
from bagel_compress.finetune.readers import open_reader
from bagel_compress.finetune.stream import ExampleStream


def group(kind: str, path: Path, **more: object) -> DataGroup:
    return DataGroup.model_validate({"kind": kind, "path": str(path)} | more)


def draw(stream: ExampleStream, count: int) -> None:
    for _ in range(count):
        stream.draw()


def groups(folder: Path) -> list[DataGroup]:
    data.edit(folder / "edit")
    data.vlm(folder / "vlm")
    return [
        group("t2i", data.t2i(folder / "t2i")),
        group("edit", folder / "edit", info=str(folder / "edit" / "parquet_info.json")),
        group("vlm", folder / "vlm", jsonl=str(folder / "vlm" / "data.jsonl")),
        group("folder", data.captioned(folder / "folder")),
    ]


def test_every_layout_gives_its_examples(tmp_path: Path) -> None:
    readers = [open_reader(g) for g in groups(tmp_path)]
    assert [r.rows for r in readers] == [12, 8, 10, 8]
    shapes: list[set[tuple[str, ...]]] = [set() for _ in readers]
    for index, reader in enumerate(readers):
        stream = ExampleStream([reader], seed=1)
        for _ in range(5 * reader.rows):
            shapes[index].add(tuple(_kind(part) for part in stream.draw().example))
    draw, one, answer = ("words", "drawn"), ("clean seen", "words", "drawn"), ("seen", "words", "learnt")
    assert shapes[0] == shapes[3] == {draw}
    chain = ("clean seen", "words", "drawn clean seen", "words", "drawn")
    assert shapes[1] == {one, chain}
    assert shapes[2] == {answer}


def _kind(part: TextPart | PicturePart) -> str:
    if isinstance(part, TextPart):
        return "learnt" if part.learnt else "words"
    return " ".join(name for name in ("drawn", "clean", "seen") if getattr(part, name))


def test_streams_repeat_share_the_rows_and_go_on(tmp_path: Path) -> None:
    readers = [open_reader(g) for g in groups(tmp_path)]
    one = ExampleStream(readers, 7)
    seen = [one.draw() for _ in range(40)]
    again = ExampleStream(readers, 7)
    for _ in range(25):
        again.draw()
    resumed = ExampleStream(readers, 7)
    resumed.load(again.state())
    for drawn in seen[25:]:
        other = resumed.draw()
        assert (other.row, other.key) == (drawn.row, drawn.key)
    t2i = readers[:1]  # four row groups: whole ones are dealt to three streams, single rows to five
    for count in (3, 5):
        rows = [ExampleStream(t2i, 7, n, count) for n in range(count)]
        taken = [s.draw().row for s in rows for _ in range(s.rows(0))]
        assert len(taken) == len(set(taken)) == 12


def test_damaged_rows_are_skipped_and_named_and_more_than_a_hundredth_is_an_error(tmp_path: Path) -> None:
    folder = data.vlm(tmp_path / "vlm", 3)
    good = (folder / "data.jsonl").read_text().splitlines()
    bad = [
        "{not json", '{"image": "0.png"}', json.dumps({"image": "../x.png", "conversations": []}),
        json.dumps({"image": "gone.png", "conversations": []}), good[0].replace("<image>", ""),
    ]  # fmt: skip
    (folder / "data.jsonl").write_text("\n".join(good * 100 + bad[:3]) + "\n")
    wanted = group("vlm", folder, jsonl=str(folder / "data.jsonl"))
    stream = ExampleStream([open_reader(wanted)], 1)
    draw(stream, 300)
    (damage,) = stream.damage
    assert damage.found == {
        "data.jsonl line 301": "it is not JSON",
        "data.jsonl line 302": "it has no list of conversations",
        "data.jsonl line 303": f"'../x.png' is no name inside of {folder}",
    }
    (folder / "data.jsonl").write_text("\n".join(good * 100 + bad[:4]) + "\n")
    stream = ExampleStream([open_reader(wanted)], 1)
    with pytest.raises(FinetuneError, match=r"4 of its 304 rows cannot be used, more than 1 % \(data.jsonl line 30"):
        draw(stream, 304)


def test_what_a_row_can_lack(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    reader = open_reader(group("t2i", data.t2i(tmp_path / "t2i")))
    row = reader.load(reader.chunks[0])[0]
    for change, says in (
        ({"captions": "{}"}, "no caption"), ({"captions": None}, "no caption"), ({"image": b"GIF89a"}, "does not open"),
        ({"image": None}, "picture is missing"), ({"image": row["image"][:90]}, "does not open"),
    ):  # fmt: skip
        with pytest.raises(Exception, match=says):
            reader.example(row | change, rng)
    talk = {"conversations": [{"from": "gpt", "value": "yes"}]}
    seen = open_reader(group("vlm", data.vlm(tmp_path / "vlm", 1), jsonl=str(tmp_path / "vlm" / "data.jsonl")))
    for name in ("\ud800.png", "a\0.png", "x" * 5000, "..", "", 7, None):
        with pytest.raises(RowError):
            seen.example(json.dumps({**talk, "image": [name]}).encode(), rng)
    folder = data.captioned(tmp_path / "folder")
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_text(" \n")
    reader = open_reader(group("folder", folder))
    for name in ("3.png", "4.png"):
        with pytest.raises(Exception, match=f"{name} has no caption"):
            reader.example(name, rng)


def test_damaged_parquet(tmp_path: Path) -> None:
    folder = data.t2i(tmp_path / "t2i")
    file = folder / "00001.parquet"
    content = bytearray(file.read_bytes())
    content[4:2000] = b"\xff" * 1996  # pages, not the footer
    file.write_bytes(content)
    with pytest.raises(FinetuneError, match=r"00001.parquet row group 0 row \d: its row group cannot be read"):
        draw(ExampleStream([open_reader(group("t2i", folder))], 1), 12)
    file.write_bytes(content[:-100])
    with pytest.raises(FinetuneError, match=r"00001.parquet is no readable parquet file"):
        open_reader(group("t2i", folder))
    data.write_parquet(folder / "00001.parquet", {"picture": [b""], "captions": ["x"]})
    with pytest.raises(FinetuneError, match="has no column image"):
        draw(ExampleStream([open_reader(group("t2i", folder))], 1), 12)
    edits = data.edit(tmp_path / "edit")
    info = edits / "parquet_info.json"
    info.write_text(json.dumps({"edits.parquet": {"num_row_groups": 2, "num_rows": 7}}))
    with pytest.raises(FinetuneError, match=r"says 2 row groups and 7 rows of edits.parquet, the file has 2 and 8"):
        open_reader(group("edit", edits, info=str(info)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: 5\nmodel: x\nvisual_und: false\nvisual_gen: false", "nothing to train"),
        ("steps: 5\nmodel: x\ndata: [{kind: vlm, path: d}]", "jsonl goes with kind vlm"),
        ("steps: 5\nmodel: x\nvisual_gen: false\ndata: [{kind: t2i, path: d}]", "t2i d has pictures to draw"),
        ("steps: 5\nmodel: x\nlora: {ranks: 4}", r"unknown key 'ranks' \(did you mean rank\?\)"),
    ],
)
def test_configs_that_cannot_be(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(FinetuneError, match=says):
        FinetuneConfig.load(path)
