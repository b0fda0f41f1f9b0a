"""An item: one thing that a benchmark asks of the model. Readers make them from the benchmark's own files.

A row that cannot be read is left out, counted and named; more than one in a hundred is an error, because a score of
what is left would be compared with scores of the whole.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from bagel_compress.errors import BenchmarkError, InputError, MissingExtraError
from bagel_compress.io.pictures import FAULTS, open_picture
from bagel_compress.io.safe_paths import encodable, stays_inside

MAX_DAMAGED = 0.01  # share of rows, pictures or judge's answers that may be unreadable


@dataclass(frozen=True, slots=True)
class ItemPicture:
    """An input picture, opened when it is asked: a file or the bytes of one; `scale` enlarges it (bilinear)."""

    source: Path | bytes
    scale: int = 1

    def open(self) -> Image.Image:
        """Raises InputError if it is none."""
        try:
            image = open_picture(io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source)
            image.load()
        except (*FAULTS, Image.DecompressionBombError) as error:
            name = self.source if isinstance(self.source, Path) else f"a picture of {len(self.source)} bytes"
            raise InputError(f"{name} is not a readable picture ({error}); expected PNG, JPEG, WebP, ...") from None
        if self.scale == 1:
            return image
        return image.resize((image.width * self.scale, image.height * self.scale), Image.Resampling.BILINEAR)


@dataclass(frozen=True, slots=True)
class Item:
    """One question or picture to draw. `id` is where its picture lies below OUT/pictures, without ".png".

    Items of one `unit` are scored and resampled together (the pictures of a prompt, the two questions of a picture).
    `wanted` is for the scorer alone; `beside` are files of the official layout that lie beside its picture.
    """

    id: str
    category: str
    turns: tuple[str | ItemPicture, ...]
    output: Literal["image", "text"] = "image"
    unit: str = ""
    wanted: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, str | ItemPicture] = field(default_factory=dict)

    @property
    def cluster(self) -> str:
        return self.unit or self.id


@dataclass(slots=True)
class BenchmarkItems:
    """Items as they are read, and a sentence per row that could not be."""

    where: Path
    items: list[Item] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, item: Item) -> None:
        """Raises BenchmarkError, to be caught as a damaged row, on a name that would leave the output's folder."""
        for name in (item.id, *item.beside):
            if not stays_inside(name) or not encodable(name):
                raise BenchmarkError(f"the name {name!r} leads out of its folder")
        self.items.append(item)

    def skip(self, row: str, why: object) -> None:
        self.skipped.append(f"{row}: {why}")

    def checked(self) -> BenchmarkItems:
        """Raises BenchmarkError if there is nothing or too much of it is damaged, or two items are called alike."""
        check_damage(self.skipped, len(self.items) + len(self.skipped), f"{self.where}", "rows")
        if not self.items:
            raise BenchmarkError(f"{self.where} holds no items; docs/evaluation.md says what belongs there.")
        names = [item.id for item in self.items]
        if len(set(names)) < len(names):
            raise BenchmarkError(f"{self.where} holds two items called {max(names, key=names.count)!r}.")
        return self


def check_damage(damaged: Sequence[str], of: int, where: str, what: str) -> None:
    """Raises BenchmarkError if more than one in a hundred is damaged; the first three are named."""
    if len(damaged) > MAX_DAMAGED * of:
        named = "; ".join(damaged[:3])
        raise BenchmarkError(
            f"{where}: {len(damaged)} of {of} {what} cannot be used, at most 1 % may be; the first: {named}."
        )


def required(folder: Path, name: str, benchmark: str, what: str) -> Path:
    """A file or folder of the benchmark's data. Raises BenchmarkError that says which is missing and where it goes."""
    path = folder / name
    if not path.exists():
        raise BenchmarkError(
            f"{benchmark} needs {path} ({what}), which does not exist; put it there (docs/evaluation.md)."
        )
    return path


def existing_picture(folder: Path, name: object) -> ItemPicture:
    """A picture below a folder of data. Raises BenchmarkError, to be caught as a damaged row."""
    if not isinstance(name, str) or not stays_inside(name):
        raise BenchmarkError(f"the picture {name!r} is no path inside of {folder}")
    if not (folder / name).is_file():
        raise BenchmarkError(f"{folder / name} does not exist")
    return ItemPicture(folder / name)


def read_json(path: Path) -> Any:
    """Raises BenchmarkError if the file is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path} is not readable JSON ({error}); download it again.") from None


def read_lines(path: Path) -> list[str]:
    """Lines of a text file that hold something. Raises BenchmarkError if it is not UTF-8."""
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} is not readable text ({error}); download it again.") from None


def parquet_rows(files: Iterable[Path]) -> Iterable[tuple[str, dict[str, Any]]]:
    """(name, row) of parquet files, one batch in memory. Raises BenchmarkError on a damaged file."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError(
            "parquet files need the package pyarrow; install it with: pip install 'bagel-compress[evaluate]'."
        ) from None
    for path in files:
        try:
            for number, batch in enumerate(parquet.ParquetFile(path).iter_batches(64)):
                for offset, row in enumerate(batch.to_pylist()):
                    yield f"{path} row {number * 64 + offset}", row
        except (OSError, pa.ArrowException) as error:
            raise BenchmarkError(f"{path} is not a readable parquet file ({error}); download it again.") from None


def text_of(row: Mapping[str, Any], key: str) -> str:
    """A text of a row. Raises BenchmarkError, to be caught as a damaged row."""
    value = row.get(key) if isinstance(row, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        raise BenchmarkError(f"{key} is {str(value)[:40]!r}, expected a text")
    if not encodable(value):
        raise BenchmarkError(f"{key} holds half a character (an unpaired surrogate)")
    return value
