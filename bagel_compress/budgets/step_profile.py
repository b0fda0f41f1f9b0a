"""Profiles a denoising pass and compares its time with its floor, the time of its matrix products and attention alone.

While the real pass runs once, every call of `F.linear` and of attention is recorded with its inputs. The floor is the
time of repeating just those calls; it is measured alternately with the pass. The difference is spent on norms, rotary
positions, residuals, copies, the decoding of coded weights, and Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function

from bagel.branches import Branches
from bagel.layers import RMSNorm
from bagel.sampler import Sampler

ATTENTION = "attention"
NORMS = "norms"
OTHER = "rotary positions, residuals, copies, Python"
KINDS = {
    "q_proj": "q, k, v", "k_proj": "q, k, v", "v_proj": "q, k, v", "o_proj": "o", "gate_proj": "gate, up",
    "up_proj": "gate, up", "down_proj": "down",
}  # fmt: skip
PREFIX = "part: "


@dataclass(frozen=True, slots=True)
class StepProfile:
    """The times of a pass."""

    seconds: float  # of one pass, median
    floor: float  # seconds of its products and attention alone, median
    shares: dict[str, float] = field(default_factory=dict)  # part -> share of the pass's time

    @property
    def ratio(self) -> float:
        """The time of the pass as a multiple of its floor."""
        return self.seconds / self.floor


def profile_step(sampler: Sampler, size: tuple[int, int], prompt: str = "a red cat", repeats: int = 9) -> StepProfile:
    """Profiles one conditional denoising pass for a picture of `size` (H, W).

    On the CPU, times are CPU times of the process, summed over threads, so that other programs disturb them little; on
    CUDA they are wall-clock times with synchronisation.
    """
    device = sampler.bagel.device
    with torch.no_grad():
        run = _pass(sampler, size, prompt)
        with _StepRecorder() as recorder:
            run()
        calls = recorder.calls

        def floor() -> None:
            for function, args, kwargs in calls:
                function(*args, **kwargs)

        seconds: list[float] = []
        floors: list[float] = []
        for turn in range(repeats + 2):  # the first two warm up
            for found, work in ((seconds, run), (floors, floor)):
                taken = _seconds(work, device)
                if turn >= 2:
                    found.append(taken)
        return StepProfile(_median(seconds), _median(floors), _shares(sampler, run))


def _pass(sampler: Sampler, size: tuple[int, int], prompt: str) -> Callable[[], Tensor]:
    branches, grid = Branches(sampler), sampler.grid(size)
    sampler.read(branches, [[prompt]], "image")
    x = sampler.start(sampler.normal((grid[0] * grid[1], sampler.bagel.config.latent_width), sampler.generator(0)))

    def run() -> Tensor:
        block = sampler.bagel.noisy_block(x, torch.tensor(0.5), [grid], sampler.wrap)
        return sampler.bagel.velocity(block, branches.cond)

    return run


class _StepRecorder(TorchFunctionMode):
    """Records the calls of linear products and attention with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.scaled_dot_product_attention):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _shares(sampler: Sampler, run: Callable[[], object]) -> dict[str, float]:
    """Part -> share of the pass's time, from torch's profiler."""
    with _marked(sampler.bagel), profile(activities=[ProfilerActivity.CPU]) as trace, record_function(PREFIX + "pass"):
        run()
    found: dict[str, float] = {}
    for event in trace.key_averages():
        if event.key.startswith(PREFIX):
            found[event.key.removeprefix(PREFIX)] = event.cpu_time_total
        elif event.key == "aten::scaled_dot_product_attention":
            found[ATTENTION] = event.cpu_time_total
    total = found.pop("pass")
    found[OTHER] = total - sum(found.values())
    return {part: value / total for part, value in sorted(found.items(), key=lambda item: -item[1])}


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Inside, the profiler records the decoder's linear modules and norms under the names of their parts."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            kind = KINDS.get(path.rpartition(".")[2]) if path.startswith("layers.") else None
            part = NORMS if isinstance(module, RMSNorm) else f"products: {kind}" if kind else None
            if part is not None:
                _mark(stack, module, part)
        yield


def _mark(stack: ExitStack, module: nn.Module, part: str) -> None:
    open_marks: list[record_function] = []

    def begin(*_: object) -> None:
        mark = record_function(PREFIX + part)
        mark.__enter__()
        open_marks.append(mark)

    def end(*_: object) -> None:
        open_marks.pop().__exit__(None, None, None)

    for handle in (module.register_forward_pre_hook(begin), module.register_forward_hook(end)):
        stack.callback(handle.remove)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - begun
    begun = time.process_time()
    work()
    return time.process_time() - begun


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
