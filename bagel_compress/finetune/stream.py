"""An endless, repeatable stream of examples from several data groups, dealt out to parallel streams.

The n-th draw of a stream depends on the seed, the stream's number and n alone. So its position is a few counters, a
resumed run sees what it would have seen, and two processes see what one process with two streams sees.

Per epoch the chunks of a group are shuffled, and the rows inside of each chunk. Chunks are dealt to the streams whole
where there are enough of them, else their rows are dealt one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bagel_compress.errors import FinetuneError
from bagel_compress.finetune.example import Example, RowError
from bagel_compress.finetune.readers import ExampleReader, RowChunk

MOST_DAMAGED = 0.01  # share of a group's rows that may be damaged
NAMED = 3  # damaged rows that an error names


class Damage:
    """Rows of a group that could not be used, by name. More than 1 % of all its rows is an error."""

    def __init__(self, group: str, rows: int) -> None:
        self.group, self.rows = group, rows
        self.found: dict[str, str] = {}

    def add(self, row: str, why: str) -> None:
        """Raises FinetuneError when it becomes too many."""
        self.found[row] = why
        if len(self.found) > MOST_DAMAGED * self.rows:
            named = "; ".join(f"{row}: {why}" for row, why in list(self.found.items())[-NAMED:])
            raise FinetuneError(
                f"data group {self.group}: {len(self.found)} of its {self.rows} rows cannot be used, more than 1 %"
                f" ({named}); repair or remove them."
            )


@dataclass(slots=True)
class _Cursor:
    """Where a stream is in one group: `position` counts the rows of this epoch that were taken."""

    reader: ExampleReader
    damage: Damage
    epoch: int = 0
    position: int = 0
    chunk: RowChunk | None = None
    loaded: Sequence[Any] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Drawn:
    """An example with what it came from; `key` seeds everything random about it."""

    example: Example
    group: int
    row: str
    key: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Share:
    """The rows of a chunk that are a stream's: every `step`-th of the shuffled ones from `first` on, `size` of them."""

    chunk: int
    first: int
    step: int
    size: int


class ExampleStream:
    """Stream number `number` of `count`."""

    def __init__(
        self,
        readers: Sequence[ExampleReader],
        seed: int,
        number: int = 0,
        count: int = 1,
        damage: Sequence[Damage] = (),
    ) -> None:
        """`damage`: one for each reader, shared by the streams of a process."""
        self.seed, self.number, self.count = seed, number, count
        damage = damage or [Damage(r.group.name, r.rows) for r in readers]
        self.damage = tuple(damage)
        self._cursors = [_Cursor(reader, found) for reader, found in zip(readers, damage, strict=True)]
        weights = np.array([r.group.weight for r in readers])
        self._shares = weights / weights.sum()
        self.draws = 0
        for index, cursor in enumerate(self._cursors):
            if not self.rows(index, 0):
                raise FinetuneError(
                    f"data group {cursor.reader.group.name} has {cursor.reader.rows} rows, too few for {count} streams"
                    " (processes times accumulate); use fewer."
                )

    def draw(self) -> Drawn:
        """The next example. Damaged rows are skipped, counted and named. Raises FinetuneError if they are too many."""
        while True:
            key = (self.seed, self.number, self.draws)
            rng = np.random.default_rng((*key, 0))
            group = int(rng.choice(len(self._cursors), p=self._shares))
            self.draws += 1
            cursor = self._cursors[group]
            chunk, row = self._next(group)
            try:
                if cursor.chunk != chunk:
                    cursor.loaded, cursor.chunk = (), None
                    cursor.loaded, cursor.chunk = cursor.reader.load(chunk), chunk
                return Drawn(cursor.reader.example(cursor.loaded[row], rng), group, chunk.row_name(row), key)
            except RowError as fault:
                cursor.damage.add(chunk.row_name(row), str(fault))

    def state(self) -> dict[str, Any]:
        """Where the stream is, as plain numbers."""
        return {"draws": self.draws, "cursors": [[c.epoch, c.position] for c in self._cursors]}

    def rows(self, group: int, epoch: int = 0) -> int:
        """How many rows of a group are this stream's in an epoch."""
        return sum(part.size for part in self._order(group, epoch))

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was."""
        self.draws = int(state["draws"])
        for cursor, (epoch, position) in zip(self._cursors, state["cursors"], strict=True):
            cursor.epoch, cursor.position = int(epoch), int(position)

    def _next(self, group: int) -> tuple[RowChunk, int]:
        """The next row of a group: its chunk and its number there."""
        cursor = self._cursors[group]
        if cursor.position >= self.rows(group, cursor.epoch):
            cursor.epoch, cursor.position = cursor.epoch + 1, 0
        left = cursor.position
        cursor.position += 1
        for part in self._order(group, cursor.epoch):
            if left < part.size:
                chunk = cursor.reader.chunks[part.chunk]
                rows = np.random.default_rng((self.seed, group, cursor.epoch, part.chunk)).permutation(chunk.rows)
                return chunk, int(rows[part.first :: part.step][left])
            left -= part.size
        raise AssertionError("the position lies inside of the epoch")

    def _order(self, group: int, epoch: int) -> list[_Share]:
        """What of each chunk is this stream's in an epoch, in the order in which it is read."""
        chunks = self._cursors[group].reader.chunks
        order = np.random.default_rng((self.seed, group, epoch)).permutation(len(chunks)).tolist()
        if len(chunks) >= self.count:
            return [_Share(i, 0, 1, chunks[i].rows) for i in order[self.number :: self.count]]
        shares, before = [], 0
        for i in order:
            first = (self.number - before) % self.count
            shares.append(_Share(i, first, self.count, len(range(first, chunks[i].rows, self.count))))
            before += chunks[i].rows
        return shares
