"""How many threads of the CPU a run takes: one, if the model is too small for its products to be shared.

Threads that share a product wait for each other at its end. A product of BAGEL-nano takes some 50 microseconds; where
other programs hold a core, the thread that is done waits for milliseconds until the other one gets its turn, at every
product. So a small model runs on one thread, whatever torch is set to; other runs of the process keep their number.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bagel.config import LLMConfig

# Weights of a layer's largest product from which it pays to share it: with fewer, the rows of a 256 x 256 picture take
# one core less than 5 ms in fp32. BAGEL-nano has 2^15, the released model 2^26.
SHARED_FROM = 1 << 20

_lock = threading.Lock()
_runs = 0  # inside `one_thread`, of all Python threads
_before = 0  # torch's number of threads when the first of them began


def too_small_to_share(config: LLMConfig) -> bool:
    """Whether the model's products are so small that a second thread costs more than it does."""
    return config.hidden_size * config.intermediate_size < SHARED_FROM


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread; at its end on as many as before the first of the runs that overlap it.

    Of runs that overlap, the first to end gives the number back to all of them.
    """
    global _runs, _before
    with _lock:
        if not _runs:
            _before = torch.get_num_threads()
        _runs += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _runs -= 1
            torch.set_num_threads(_before)
