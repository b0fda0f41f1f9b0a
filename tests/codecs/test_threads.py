"""The two ways in which kernels share threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from bagel_compress.codecs.kernels.threads import ordered, split


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_split_covers_the_range_once(threads: int) -> None:
    for count, grain in ((0, 1), (1, 1), (10, 3), (100, 7)):
        parts: list[tuple[int, int]] = []
        split(lambda start, stop, parts=parts: parts.append((start, stop)), count, grain)
        assert [i for start, stop in sorted(parts) for i in range(start, stop)] == list(range(count))
        assert len(parts) <= threads


def test_results_come_in_order_and_few_items_are_begun_ahead(threads: int) -> None:
    begun, running, most = [], set(), [0]
    lock = threading.Lock()

    def work(item: int) -> int:
        with lock:
            running.add(item)
            most[0] = max(most[0], len(running))
        time.sleep(0.003 * (item % 3))  # later items end first
        with lock:
            running.remove(item)
        return item * item

    def items() -> Iterator[int]:
        for item in range(20):
            begun.append(item)
            yield item

    for k, result in enumerate(ordered(work, items())):
        assert result == k * k
        assert len(begun) - k <= 2 * threads
    assert len(begun) == 20
    assert most[0] <= threads


def test_a_fault_comes_out_where_its_result_would_and_leaves_nothing_running(threads: int) -> None:
    ended = []

    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        time.sleep(0.005)
        ended.append(item)
        return item

    taken: list[int] = []
    with pytest.raises(ValueError, match="three"):
        taken.extend(ordered(work, range(50)))
    assert taken == [0, 1, 2]
    count = len(ended)
    assert count <= 3 + 2 * threads
    time.sleep(0.02)
    assert len(ended) == count
