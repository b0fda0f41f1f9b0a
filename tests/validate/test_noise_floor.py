"""The noise floor compares two attention kernels, also where flash-attn is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bagel import layers
from bagel.sampler import FlowSettings, Sampler
from bagel_compress.parity.record import computed_differently

FLOW = FlowSettings(num_timesteps=3)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A stand-in for the flash-attn package, and tensors that say they are on CUDA; the list has an entry per call."""
    calls: list[int] = []

    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, causal: bool, **more: Any) -> Tensor:
        calls.append(len(q))
        parts = [x.tensor_split(more[f"cu_seqlens_{n}"][1:-1].long()) for x, n in ((q, "q"), (k, "k"), (v, "k"))]
        with layers.attention_kernel("exact"):
            return layers.attention(*parts, causal=causal)

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    layers.flash_varlen.cache_clear()
    yield calls
    layers.flash_varlen.cache_clear()


def test_the_other_kernel_is_not_the_installed_one(flash: list[int], reference: Sampler) -> None:
    reference.run(["a cat"], size=(32, 32), flow=FLOW)
    assert flash, "the model runs on flash-attn"
    flash.clear()
    with computed_differently(reference, "kernel") as other:
        other.run(["a cat"], size=(32, 32), flow=FLOW)
    assert flash == []
