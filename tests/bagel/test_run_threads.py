"""A model too small to share its products runs on one thread, and leaves torch's number of threads as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from bagel.errors import BagelError
from bagel.events import Listener, Step
from bagel.sampler import FlowSettings, Sampler
from bagel.threads import one_thread, too_small_to_share


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Count(Listener):
    def __init__(self, stop: bool = False) -> None:
        self.threads: set[int] = set()
        self._stop = stop

    def after_step(self, step: Step) -> Step:
        self.threads.add(torch.get_num_threads())
        if self._stop:
            raise BagelError("stopped")
        return step


def test_sizes_that_share(bf16: Sampler) -> None:
    small = bf16.bagel.config.llm
    assert too_small_to_share(small)
    assert too_small_to_share(replace(small, hidden_size=128, intermediate_size=320))  # BAGEL-nano
    assert not too_small_to_share(replace(small, hidden_size=1024, intermediate_size=4096))  # synth medium
    assert not too_small_to_share(replace(small, hidden_size=3584, intermediate_size=18944))  # the released model


@pytest.mark.usefixtures("two_threads")
def test_a_small_model_runs_on_one_thread(bf16: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, count = FlowSettings(num_timesteps=3), Count()
    bf16.run(["a cat"], size=(32, 32), flow=flow, listener=count)
    assert count.threads == {1}
    assert torch.get_num_threads() == 2
    with pytest.raises(BagelError, match="stopped"):
        bf16.run(["a cat"], size=(32, 32), flow=flow, listener=Count(stop=True))
    assert torch.get_num_threads() == 2
    monkeypatch.setattr("bagel.sampler.too_small_to_share", lambda config: False)
    large = Count()
    bf16.run(["a cat"], size=(32, 32), flow=flow, listener=large)
    assert large.threads == {2}


def in_new_thread(work: Callable[[], int]) -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.usefixtures("two_threads")
def test_the_last_run_of_a_thread_restores_the_number() -> None:
    """Two runs of one thread overlap as two generators do; the first to end leaves the other on one thread."""
    first, second = one_thread(), one_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_num_threads() == 1
    second.__exit__(None, None, None)
    assert torch.get_num_threads() == 2
    assert in_new_thread(torch.get_num_threads) == 2


@pytest.mark.usefixtures("two_threads")
def test_runs_of_two_threads_that_overlap() -> None:
    """The second begins inside the first, goes on alone on one thread, and ends with the number from before both."""
    inside, alone = threading.Event(), threading.Event()
    seen: list[int] = []

    def run() -> None:
        with one_thread():
            inside.set()
            assert alone.wait(10)
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    second = threading.Thread(target=run)
    with one_thread():
        second.start()
        assert inside.wait(10)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    alone.set()
    second.join()
    assert seen == [1, 2]
    assert torch.get_num_threads() == 2
    assert in_new_thread(torch.get_num_threads) == 2
