"""Runs compiled kernels on several threads: over the parts of one range, or over blocks that follow each other.

Python threads and kernels that release the GIL, not numba's own thread pool: that one aborts when two Python threads
enter it at once (its portable `workqueue` layer), which a pipeline of readers and encoders does. The number of threads
is torch's (`torch.set_num_threads`). Results never depend on it: each part writes its own rows, each block its own
buffers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def split(work: Callable[[int, int], object], count: int, grain: int) -> None:
    """Calls work(start, stop) so that [0, count) is covered once, in parts of whole `grain`s except the last."""
    import torch

    threads = torch.get_num_threads()
    parts = min(threads, -(-count // grain))
    if parts <= 1:
        work(0, count)
        return
    step = -(-count // (parts * grain)) * grain
    futures = [_pool(threads).submit(work, start, min(start + step, count)) for start in range(step, count, step)]
    work(0, step)
    for future in futures:
        future.result()


def ordered(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results of `work` in the order of `items`, which one thread takes while others work.

    At most twice as many items as there are threads are begun and not yet handed on. Unlike after `split`, no thread
    waits for the others at the end of its part.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(work, items)
        return
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(_pool(threads).submit(work, item))
            if len(begun) == 2 * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
        wait(begun)


class Workspaces(Generic[Item]):
    """Scratch memory for batches: a thread takes one, whoever has used its content gives it back.

    Kept for the life of the process, since the first touch of fresh memory costs more than coding; `ordered` bounds
    their number to two per thread and one. Thread-safe: appending to and popping from a list are atomic.
    """

    def __init__(self, make: Callable[[], Item]) -> None:
        self._make = make
        self._free: list[Item] = []

    def take(self) -> Item:
        try:
            return self._free.pop()
        except IndexError:
            return self._make()

    def give(self, space: Item) -> None:
        self._free.append(space)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="encode")
