"""Asks a model everything that a benchmark asks, and keeps what it gives so that a killed run goes on.

    OUT/settings.json        what the run is: benchmark, model, sampler settings, seed, subset. Another one is refused.
    OUT/pictures/ID.png      pictures, in the layout of the official scorers (thoughts beside them in ID.txt)
    OUT/answers/I-of-N.jsonl answers, one line each, per process
    OUT/skipped/I-of-N.jsonl items that could not be asked because their picture does not open

Every item has noise of its own, from the seed and its place in the benchmark: the order, the batches, the processes and
a restart change nothing. Process I of N does every N-th unit.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bagel.loops import Request
from bagel.settings import FlowSettings, TextSettings
from bagel_compress.errors import BenchmarkError, InputError
from bagel_compress.evaluate.items import Item, ItemPicture
from bagel_compress.io.atomic import atomic_path, write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

    from bagel.loops import Loops

SETTINGS, PICTURES, ANSWERS, SKIPPED = "settings.json", "pictures", "answers", "skipped"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What decides a run's results. `size` (H, W) of drawn pictures; `limit` of units, 0 for all."""

    benchmark: str
    model: str  # digest
    data: str  # digest of what is asked
    flow: FlowSettings
    text: TextSettings
    size: tuple[int, int]
    pictures: int = 1
    think: bool = False
    seed: int = 42
    limit: int = 0
    dtype: str = "bf16"

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    def claim(self, out: Path) -> None:
        """Writes OUT/settings.json, or raises BenchmarkError if another run's results are in that folder."""
        path, own = out / SETTINGS, self.to_json()
        if not path.exists():  # parts that begin at once write under names of their own; the last one stays
            written = out / f"{SETTINGS}.{os.getpid()}-{secrets.token_hex(4)}"
            write_atomic(written, json.dumps(own, indent=1) + "\n")
            written.replace(path)
        found = read_settings(out)
        for key in own:
            if found.get(key) != own[key]:
                raise BenchmarkError(
                    f"{out} holds a run with another {key} ({json.dumps(found.get(key))}, now {json.dumps(own[key])});"
                    " give the settings of before or another --out."
                )


def read_settings(out: Path) -> dict[str, Any]:
    """Settings of the run in a folder. Raises BenchmarkError if there is none."""
    try:
        found = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise BenchmarkError(f"{out} holds no results of `bagel-compress evaluate` ({SETTINGS} is missing).") from None
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class Shard:
    """Process `index` of `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise BenchmarkError(f"shard {self.index}/{self.count}: expected I/N with I from 0 to N-1.")

    @property
    def file(self) -> str:
        return f"{self.index}-of-{self.count}.jsonl"


def subset(items: Sequence[Item], limit: int) -> list[Item]:
    """All items of `limit` units that are spread evenly over the benchmark; 0 takes all of it."""
    units = list(dict.fromkeys((item.category, item.cluster) for item in items))
    if not limit or limit >= len(units):
        return list(items)
    kept = {units[i * len(units) // limit] for i in range(limit)}
    return [item for item in items if (item.category, item.cluster) in kept]


def run(
    settings: RunSettings,
    items: Sequence[Item],
    open_sampler: Callable[[], Loops],
    out: Path,
    shard: Shard = Shard(),
    batch: int = 8,
    progress: Progress | None = None,
) -> None:
    """Asks the items of one process that have no result yet. The model is opened only if there are any."""
    settings.claim(out)
    done = set(answers_of(out)) | set(skipped_of(out))
    mine = _share(items, shard)
    left = [(i, item) for i, item in mine if item.id not in done and not _drawn(out, item)]
    if not left:
        return
    sampler, finished = open_sampler(), len(mine) - len(left)
    with _appending(out / ANSWERS / shard.file) as answers, _appending(out / SKIPPED / shard.file) as skipped:
        for part in _batches(settings, left, batch):
            opened = _opened(part, skipped)
            if opened and opened[0][1].output == "text":
                _ask(settings, sampler, opened, answers)
            elif opened:
                _draw(settings, sampler, opened, out)
            finished += len(part)
            if progress is not None:
                progress(finished, len(mine))


def _share(items: Sequence[Item], shard: Shard) -> list[tuple[int, Item]]:
    """Items of one process with their places; units stay whole, for their files lie together."""
    units = {unit: number for number, unit in enumerate(dict.fromkeys(item.cluster for item in items))}
    return [(i, item) for i, item in enumerate(items) if units[item.cluster] % shard.count == shard.index]


def _batches(
    settings: RunSettings, left: Sequence[tuple[int, Item]], batch: int
) -> Iterator[Sequence[tuple[int, Item]]]:
    """Neighbours that can be drawn in one pass. A norm over the whole batch would couple them: then one by one."""
    flow = settings.flow
    coupled = flow.cfg_renorm_type == "global" and flow.cfg_renorm_min < 1 and flow.cfg_text_scale > 1
    most = 1 if coupled else batch
    part: list[tuple[int, Item]] = []
    for entry in left:
        if part and (len(part) == most or _kinds(part[0][1]) != _kinds(entry[1])):
            yield part
            part = []
        part.append(entry)
    if part:
        yield part


def _kinds(item: Item) -> tuple[Any, ...]:
    return item.output, *(isinstance(turn, str) for turn in item.turns)


Opened = tuple[int, Item, list["str | Image"]]


def _opened(part: Sequence[tuple[int, Item]], skipped: TextIO) -> list[Opened]:
    found = []
    for index, item in part:
        try:
            found.append((index, item, [turn.open() if isinstance(turn, ItemPicture) else turn for turn in item.turns]))
        except InputError as error:
            _append(skipped, {"id": item.id, "why": str(error)})
    return found


def _seed(settings: RunSettings, index: int) -> int:
    return settings.seed * 1_000_003 + index


def _ask(settings: RunSettings, sampler: Loops, part: Sequence[Opened], answers: TextIO) -> None:
    """The evaluation path of the official scripts: pictures through the ViT alone, then the question."""
    for index, item, turns in part:
        pictures = [turn for turn in turns if not isinstance(turn, str)]
        question = "\n".join(turn for turn in turns if isinstance(turn, str))
        result = sampler.chat(pictures, question, settings.text, _seed(settings, index))
        _append(answers, {"id": item.id, "answer": result.text or ""})


def _draw(settings: RunSettings, sampler: Loops, part: Sequence[Opened], out: Path) -> None:
    results = sampler.run_batch(
        [Request(turns, settings.size, _seed(settings, index)) for index, _, turns in part],
        output="image", think=settings.think, flow=settings.flow, text=settings.text,
    )  # fmt: skip
    for (_, item, _), result in zip(part, results, strict=True):
        for name, content in item.beside.items():
            _write_beside(out / PICTURES / name, content)
        if settings.think:
            write_atomic(out / PICTURES / f"{item.id}.txt", result.text or "")
        assert result.image is not None
        with atomic_path(picture_of(out, item)) as partial:  # last: the picture is there, so the item is done
            result.image.save(partial, "PNG")


def _write_beside(path: Path, content: str | ItemPicture) -> None:
    if path.exists():
        return
    if isinstance(content, str):
        write_atomic(path, content)
        return
    with atomic_path(path) as partial:
        content.open().save(partial, "PNG")


def picture_of(out: Path, item: Item) -> Path:
    """Where the picture of an item lies."""
    return out / PICTURES / f"{item.id}.png"


def _drawn(out: Path, item: Item) -> bool:
    return item.output == "image" and picture_of(out, item).is_file()


def answers_of(out: Path) -> dict[str, str]:
    """Item id -> answer, of all processes so far."""
    return {row["id"]: row["answer"] for row in read_rows(out / ANSWERS)}


def skipped_of(out: Path) -> dict[str, str]:
    """Item id -> why it could not be asked."""
    return {row["id"]: row["why"] for row in read_rows(out / SKIPPED)}


def unfinished(out: Path, items: Sequence[Item]) -> list[Item]:
    """Items without a result."""
    done = set(answers_of(out)) | set(skipped_of(out))
    return [item for item in items if item.id not in done and not _drawn(out, item)]


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of the JSONL files of a folder; a last line that a kill cut short is passed over and asked again."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def _appending(path: Path) -> TextIO:
    """A JSONL file to append to, after whole lines only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        write_atomic(path, content[: content.rfind(b"\n") + 1])
    return path.open("a", encoding="utf-8", newline="\n")


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()
    os.fsync(file.fileno())
