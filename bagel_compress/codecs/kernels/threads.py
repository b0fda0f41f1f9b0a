"""Runs a compiled kernel over a range in contiguous parts, one per thread.

Python threads and kernels that release the GIL, not numba's own thread pool: that one aborts when two Python threads
enter it at once (its portable `workqueue` layer), which a pipeline of readers and encoders does. The number of threads
is torch's (`torch.set_num_threads`). Results never depend on it: each part writes its own rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


def split(work: Callable[[int, int], object], count: int, grain: int) -> None:
    """Calls work(start, stop) so that [0, count) is covered once, in parts of whole `grain`s except the last."""
    import torch

    parts = min(torch.get_num_threads(), -(-count // grain))
    if parts <= 1:
        work(0, count)
        return
    step = -(-count // (parts * grain)) * grain
    futures = [_pool().submit(work, start, min(start + step, count)) for start in range(step, count, step)]
    work(0, step)
    for future in futures:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="encode")
