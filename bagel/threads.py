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
_before = 1  # torch's number of threads when the first of them began
_own = threading.local()  # of this Python thread: `runs` inside `one_thread`, `before` the outermost of them


def too_small_to_share(config: LLMConfig) -> bool:
    """Whether the model's products are so small that a second thread costs more than it does."""
    return config.hidden_size * config.intermediate_size < SHARED_FROM


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread; the last run to leave gives the number of before back.

    torch keeps the number per Python thread and starts new ones with the number that was set last, by whomever. So runs
    are counted in each thread, and a thread that began beside a run goes back to the number from before that run.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _runs, _before
    with _lock:
        number = torch.get_num_threads()  # also ties the number to this thread: from now on no other changes it
        if not _runs:
            _before = number
        _runs += 1
        if not getattr(_own, "runs", 0):
            _own.runs, _own.before = 0, _before if number == 1 else number
        _own.runs += 1
        torch.set_num_threads(1)


def _leave() -> None:
    global _runs
    with _lock:
        _runs -= 1
        _own.runs -= 1
        if not _own.runs:
            torch.set_num_threads(_own.before)
