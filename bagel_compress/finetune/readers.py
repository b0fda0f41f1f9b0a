"""Rows of the four data layouts: text to image and editing in parquet, conversations in JSONL, a folder with captions.

A reader knows its chunks (row groups, blocks of lines) and their sizes from footers alone, loads one chunk at a time,
and turns a row into an `Example`. What is wrong with one row is a `RowError`; what is wrong with the whole source is a
FinetuneError. Columns and keys are those of the official data groups (`t2i_pretrain`, `unified_edit`, `vlm_sft`).
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagel.errors import BagelError
from bagel.images import to_rgb
from bagel_compress.errors import FinetuneError, MissingExtraError
from bagel_compress.finetune.config import DataGroup
from bagel_compress.finetune.example import Example, PicturePart, RowError, TextPart
from bagel_compress.io.pictures import FAULTS, open_picture
from bagel_compress.io.safe_paths import encodable, is_file

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LINES = 256  # lines or files of a chunk, where the layout has no row groups
IMAGE_MARK = "<image>"  # where a picture stands in a conversation


@dataclass(frozen=True, slots=True)
class RowChunk:
    """A stretch of rows that is loaded at once."""

    file: Path
    index: int  # row group, or number of the first line
    rows: int

    def row_name(self, row: int) -> str:
        """How a row is named in messages, counted from 0 in its row group or file."""
        if self.file.suffix == ".parquet":
            return f"{self.file.name} row group {self.index} row {row}"
        return f"{self.file.name} line {self.index + row + 1}"


class ExampleReader(ABC):
    """Chunks and rows of one data group."""

    def __init__(self, group: DataGroup) -> None:
        self.group, self.folder = group, Path(group.path)
        if not self.folder.is_dir():
            raise FinetuneError(f"data group {group.name}: {self.folder} is no folder; give the one with its files.")
        self.chunks = self.find()
        if not sum(chunk.rows for chunk in self.chunks):
            raise FinetuneError(f"data group {group.name} has no rows; {self.expects}.")

    expects: str  # what a right folder holds, for errors

    @property
    def rows(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)

    @abstractmethod
    def find(self) -> list[RowChunk]:
        """All chunks, in the order of their names."""

    @abstractmethod
    def load(self, chunk: RowChunk) -> Sequence[Any]:
        """The rows of a chunk. Raises RowError if none of it can be read."""

    @abstractmethod
    def example(self, row: Any, rng: np.random.Generator) -> Example:
        """A row as texts and pictures; `rng` chooses where the row leaves a choice. Raises RowError."""

    def fail(self, what: str) -> FinetuneError:
        return FinetuneError(f"data group {self.group.name}: {what}")


class _Parquet(ExampleReader):
    columns: tuple[str, ...]
    expects = "expected *.parquet files with row groups"

    def find(self) -> list[RowChunk]:
        files = sorted(self.folder.rglob("*.parquet"))
        if not files:
            raise self.fail(f"{self.folder} holds no *.parquet files.")
        if self.group.info is not None:
            return self._listed({file.name: file for file in files})
        chunks = []
        for file in files:
            footer = self._footer(file)
            chunks += [RowChunk(file, i, footer.row_group(i).num_rows) for i in range(footer.num_row_groups)]
        return chunks

    def _footer(self, file: Path) -> Any:
        try:
            return _pyarrow().ParquetFile(file).metadata
        except _parquet_faults() as fault:
            raise self.fail(f"{file} is no readable parquet file ({_short(fault)}); copy it again.") from None

    def _listed(self, files: Mapping[str, Path]) -> list[RowChunk]:
        """From parquet_info: file -> num_row_groups and num_rows. Files are found by their names in the folder."""
        path = Path(str(self.group.info))
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            counts = {Path(k).name: (int(v["num_row_groups"]), int(v["num_rows"])) for k, v in table.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
            raise self.fail(
                f"{path} is no parquet_info ({type(fault).__name__}: {fault}); expected JSON from file names to"
                " num_row_groups and num_rows."
            ) from None
        if missing := sorted(counts.keys() - files.keys()):
            raise self.fail(f"{path} lists {missing[0]}, which is not in {self.folder}; copy it there.")
        chunks = []
        for name, (groups, rows) in sorted(counts.items()):
            footer = self._footer(files[name])
            if (footer.num_row_groups, footer.num_rows) != (groups, rows):
                raise self.fail(
                    f"{path} says {groups} row groups and {rows} rows of {name}, the file has"
                    f" {footer.num_row_groups} and {footer.num_rows}; make the info again."
                )
            chunks += [RowChunk(files[name], i, footer.row_group(i).num_rows) for i in range(groups)]
        return chunks

    def load(self, chunk: RowChunk) -> Sequence[Any]:
        try:
            with _pyarrow().ParquetFile(chunk.file) as file:
                if missing := [c for c in self.columns if c not in file.schema_arrow.names]:
                    raise self.fail(f"{chunk.file} has no column {missing[0]}; expected {', '.join(self.columns)}.")
                return file.read_row_group(chunk.index, columns=list(self.columns)).to_pylist()  # type: ignore[no-any-return]
        except _parquet_faults() as fault:
            raise RowError(f"its row group cannot be read ({_short(fault)})") from None


class TextToImageReader(_Parquet):
    """Columns `image` (bytes) and `captions` (JSON: a mapping or list of captions, one is chosen; or a text)."""

    columns = ("image", "captions")

    def example(self, row: Any, rng: np.random.Generator) -> Example:
        return (
            TextPart(_choose(_captions(row["captions"]), rng)),
            PicturePart(_picture(row["image"]), drawn=True),
        )


class Editing(_Parquet):
    """Columns `image_list` (bytes) and `instruction_list` (a list of wordings between each picture and the next).

    A stretch of at most two steps is taken from a longer chain. Its last picture is drawn; pictures between are drawn
    and then seen, or left out and their instructions joined, with even odds.
    """

    columns = ("image_list", "instruction_list")

    def example(self, row: Any, rng: np.random.Generator) -> Example:
        images, wordings = row["image_list"], row["instruction_list"]
        if not isinstance(images, list) or len(images) < 2:
            raise RowError("image_list holds fewer than two pictures")
        if not isinstance(wordings, list) or len(wordings) < len(images) - 1:
            raise RowError(f"instruction_list holds {len(wordings or ())} steps for {len(images)} pictures")
        first = int(rng.integers(len(images) - 1))
        last = int(rng.integers(first + 1, min(first + 3, len(images))))
        texts = [_choose(_captions(wordings[i]), rng) for i in range(first, last)]
        parts: list[TextPart | PicturePart] = [PicturePart(_picture(images[first]), clean=True, seen=True)]
        if len(texts) == 2 and rng.random() < 0.5:
            parts.append(TextPart(" ".join(text.rstrip(".") + "." for text in texts)))
        else:
            for index, text in enumerate(texts[:-1], first + 1):
                parts += [TextPart(text), PicturePart(_picture(images[index]), drawn=True, clean=True, seen=True)]
            parts.append(TextPart(texts[-1]))
        return (*parts, PicturePart(_picture(images[last]), drawn=True))


class Conversations(ExampleReader):
    """A folder of pictures and a LLaVA-style JSONL: `image` (a name or a list) and `conversations` (`from`, `value`).

    What `gpt` says is learnt. `<image>` says where a picture stands; without it pictures come first.
    """

    expects = "expected a JSONL with one conversation a line"

    def find(self) -> list[RowChunk]:
        self.file = Path(str(self.group.jsonl))
        try:
            self._starts = _line_starts(self.file)
        except OSError as fault:
            raise self.fail(f"{self.file} cannot be read ({fault}).") from None
        total = len(self._starts)
        return [RowChunk(self.file, i, min(LINES, total - i)) for i in range(0, total, LINES)]

    def load(self, chunk: RowChunk) -> Sequence[Any]:
        with self.file.open("rb") as file:
            rows = []
            for start in self._starts[chunk.index : chunk.index + chunk.rows]:
                file.seek(start)
                rows.append(file.readline())
        return rows

    def example(self, row: Any, rng: np.random.Generator) -> Example:
        try:
            entry = json.loads(row)
        except (ValueError, RecursionError):
            raise RowError("it is not JSON") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise RowError("it has no list of conversations")
        names = entry.get("image", [])
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list):
            raise RowError("image is neither a name nor a list of names")
        pictures = [PicturePart(_opened(self.folder, name), seen=True, droppable=False) for name in names]
        return _conversation(entry["conversations"], pictures)


class CaptionedFolder(ExampleReader):
    """Pictures with captions: `metadata.jsonl` (`file_name`, `text`), or `NAME.txt` beside `NAME.png`."""

    expects = f"expected pictures ({', '.join(PICTURES)}) with NAME.txt beside each, or a metadata.jsonl"

    def find(self) -> list[RowChunk]:
        listed = self.folder / "metadata.jsonl"
        if listed.is_file():
            self._rows: list[Any] = [line for line in listed.read_bytes().splitlines() if line.strip()]
        else:
            files = (p for p in self.folder.rglob("*") if p.suffix.lower() in PICTURES)
            self._rows = sorted(p.relative_to(self.folder).as_posix() for p in files)
        total = len(self._rows)
        return [RowChunk(listed, i, min(LINES, total - i)) for i in range(0, total, LINES)]

    def load(self, chunk: RowChunk) -> Sequence[Any]:
        return self._rows[chunk.index : chunk.index + chunk.rows]

    def example(self, row: Any, rng: np.random.Generator) -> Example:
        name, text = (row, self._beside(row)) if isinstance(row, str) else _listed_caption(row)
        if not text.strip():
            raise RowError(f"{name} has no caption")
        return (TextPart(text.strip()), PicturePart(_opened(self.folder, name), drawn=True))

    def _beside(self, name: str) -> str:
        try:
            return (self.folder / name).with_suffix(".txt").read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RowError(f"{name} has no caption: there is no {Path(name).with_suffix('.txt')}") from None
        except (OSError, UnicodeDecodeError) as fault:
            raise RowError(f"the caption of {name} cannot be read ({_short(fault)})") from None


READERS: dict[str, type[ExampleReader]] = {
    "t2i": TextToImageReader, "edit": Editing, "vlm": Conversations, "folder": CaptionedFolder,
}  # fmt: skip


def open_reader(group: DataGroup) -> ExampleReader:
    """The reader of a data group. Raises FinetuneError, or MissingExtraError without pyarrow."""
    return READERS[group.kind](group)


# --- rows -------------------------------------------------------------------------------------------------------------


def _conversation(turns: list[Any], pictures: list[PicturePart]) -> Example:
    parts: list[TextPart | PicturePart] = []
    waiting = list(pictures)
    marked = sum(str(t.get("value", "")).count(IMAGE_MARK) for t in turns if isinstance(t, dict))
    if not marked:
        parts, waiting = [*pictures], []
    elif marked != len(pictures):
        raise RowError(f"it names {len(pictures)} pictures and marks {marked} places with {IMAGE_MARK}")
    for turn in turns:
        said = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(said, str) or turn.get("from") not in ("human", "gpt"):
            raise RowError("a turn is not {from: human | gpt, value: text}")
        if turn["from"] == "gpt":
            parts.append(TextPart(said, learnt=True))
            continue
        for index, text in enumerate(said.split(IMAGE_MARK)):
            parts += [waiting.pop(0)] if index else []
            parts += [TextPart(text.strip())] if text.strip() else []
    if not any(isinstance(part, TextPart) and part.learnt for part in parts):
        raise RowError("it holds no answer (a turn from gpt)")
    return tuple(parts)


def _listed_caption(line: bytes) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        return str(entry["file_name"]), str(entry.get("text") or "")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RowError("it is not JSON with file_name and text") from None


def _captions(value: Any) -> list[str]:
    """A JSON mapping or list of captions, a list, or one text."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("its captions are not JSON") from None
    found = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [text.strip() for text in found if isinstance(text, str) and text.strip()]


def _choose(texts: list[str], rng: np.random.Generator) -> str:
    if not texts:
        raise RowError("it has no caption")
    return texts[int(rng.integers(len(texts)))]


def _picture(content: Any) -> Image.Image:
    if not isinstance(content, bytes):
        raise RowError("its picture is missing")
    return _decoded(io.BytesIO(content), "its picture")


def _opened(folder: Path, name: Any) -> Image.Image:
    """A picture by its name in the folder, which it may not leave."""
    possible = isinstance(name, str) and encodable(name) and "\0" not in name
    if not possible or folder.resolve() not in (folder / name).resolve().parents:
        raise RowError(f"{name!r} is no name inside of {folder}")
    if not is_file(folder / name):
        raise RowError(f"there is no picture {name}")
    return _decoded(folder / name, f"picture {name}")


def _decoded(source: Any, what: str) -> Image.Image:
    try:
        with open_picture(source) as image:
            return to_rgb(image)
    except (*FAULTS, BagelError, Image.DecompressionBombError) as fault:
        raise RowError(f"{what} does not open ({_short(fault)})") from None


def _short(fault: Exception) -> str:
    return " ".join(str(fault).split())[:200] or type(fault).__name__


def _line_starts(file: Path) -> np.ndarray:
    """Byte offsets of the lines that are not empty."""
    starts, position = [], 0
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                starts.append(position)
            position += len(line)
    return np.asarray(starts, np.int64)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError(
            "parquet files need pyarrow, which is not installed; pip install 'bagel-compress[finetune]'."
        ) from None
    return pq


def _parquet_faults() -> tuple[type[Exception], ...]:
    """What pyarrow raises on a damaged file; a damaged size may ask for any amount of memory."""
    from pyarrow import ArrowException

    return OSError, ValueError, MemoryError, ArrowException
