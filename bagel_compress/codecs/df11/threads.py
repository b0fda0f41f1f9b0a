"""Runs the kernels of this package, which release the interpreter lock, on as many threads as numba is allowed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

import numba

T = TypeVar("T")
Span = tuple[int, int]
_TASKS_PER_THREAD = 4  # so that a core that is busy elsewhere holds up little


def in_spans(count: int, task: Callable[[Span], T], least: int = 1) -> list[T]:
    """`task` on consecutive (first, stop) that cover range(count); results in order.

    A span has at least `least` items, so that small work is not handed around. Threads: `numba.set_num_threads`.
    """
    threads = numba.get_num_threads()
    tasks = min(count // least, threads * _TASKS_PER_THREAD)
    if threads == 1 or tasks <= 1:
        return [task((0, count))]
    bounds = [count * k // tasks for k in range(tasks + 1)]
    return list(_pool(threads).map(task, pairwise(bounds)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "df11")
