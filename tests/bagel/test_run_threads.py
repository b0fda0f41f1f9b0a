"""A model too small to share its products runs on one thread, and leaves torch's number of threads as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
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


@pytest.mark.usefixtures("two_threads")
def test_runs_that_overlap_restore_the_number() -> None:
    """The second run begins inside the first and ends after it; a thread that starts later has the number of before."""
    inside, leave = threading.Event(), threading.Event()

    def second() -> None:
        with one_thread():
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=second)
    with one_thread():
        other.start()
        assert inside.wait(10)
    leave.set()
    other.join()
    assert torch.get_num_threads() == 2
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2]
