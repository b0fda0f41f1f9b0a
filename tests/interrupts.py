"""Ctrl-C at a chosen moment: SIGINT at the n-th Python call of a command, in the thread that runs it.

Python acts on a signal between two bytecodes of the main thread, so calls are moments of every kind: while a file is
open, between a file and its rename, inside a `finally`. Counting calls makes a moment the same on every machine.
"""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import TypeVar

from bagel_compress.cli import main

T = TypeVar("T")


@contextmanager
def usual_handler() -> Iterator[None]:
    """Python's handler of SIGINT, also where whoever started the tests lets it be ignored, as a shell's `&` does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # the command has taken its own back
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def sigint_at(call: int, code: CodeType | None = None) -> Iterator[list[int]]:
    """Sends SIGINT at the given call within `cli.main` (0: never); gives a list that counts those calls.

    With `code`, calls of that function alone count.
    """
    seen = [0]
    begun = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code is main.__code__:
            begun.append(event)
        elif event == "call" and len(begun) == 1 and code in (None, frame.f_code):
            seen[0] += 1
            if seen[0] == call:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    with usual_handler():
        sys.setprofile(profile)
        try:
            yield seen
        finally:
            sys.setprofile(None)


def calls_of(run: Callable[[], T]) -> tuple[T, int]:
    """The result of a run, and how many Python calls it made."""
    with sigint_at(0) as seen:
        result = run()
    return result, seen[0]


def moments(calls: int, count: int, seed: int) -> list[int]:
    """Calls to interrupt: the first and the last few, and others at random."""
    rng = random.Random(seed)
    return [1, *sorted(rng.randrange(2, calls) for _ in range(count - 2)), calls - rng.randrange(20)]


def bury(*locks: Path) -> None:
    """Gives locks that were left to a dead process, as the one that was interrupted is by now; here it goes on."""
    for lock in locks:
        if lock.exists():
            lock.write_text(json.dumps(json.loads(lock.read_text()) | {"pid": 2**22 + 1}))
