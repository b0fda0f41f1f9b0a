"""Measures how long a loaded model takes at a target's sizes, optionally beside the full-precision reference.

Four passes are timed: a guided denoising step, a whole picture, the first token and each further token. Every pass is
warmed up, the device is synchronised around it, and the median and the 90 % quantile of its repetitions are reported.
The reference runs in the same process and its passes alternate with the build's, so that both run under the same
conditions. Any device can be timed, and the report names it; overruns.py compares the times with the target's limits.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from bagel.branches import Branches, forks
from bagel.events import Drawing, StepInput
from bagel.flow import FlowSettings
from bagel.sampler import Sampler
from bagel_compress.budgets.fake_model import FakeText, text_of
from bagel_compress.parity.report_data import FIRST_TOKEN, IMAGE, STEP, TOKEN, Timing
from bagel_compress.run.target import Target

WARM_UP, REPEATS = 2, 7
PICTURES_WARM_UP, PICTURES = 1, 3  # fewer for whole pictures, each of which takes as long as a hundred passes
FLOW = FlowSettings()  # the official text-to-image settings: 49 steps, guided where t > 0.4
Pass = Callable[[], object]


def timings(sampler: Sampler, target: Target, reference: Sampler | None = None) -> tuple[Timing, ...]:
    """Times every pass that the target's tasks consist of, and the same passes of `reference`, if given."""
    found = []
    with _fake_text(sampler), _fake_text(reference or sampler), torch.no_grad():
        for what, make in _passes(target).items():
            other = None if reference is None else make(reference, target)
            found.append(timed(what, make(sampler, target), other, sampler.bagel.device))
    return tuple(found)


def timed(what: str, run: Pass, reference: Pass | None, device: torch.device) -> Timing:
    """Median and 90 % quantile of the seconds of `run`, whose calls alternate with those of `reference`."""
    warm_up, repeats = (PICTURES_WARM_UP, PICTURES) if what == IMAGE else (WARM_UP, REPEATS)
    own, other = [], []
    for repeat in range(warm_up + repeats):
        seconds = _seconds(run, device)
        reference_seconds = None if reference is None else _seconds(reference, device)
        if repeat >= warm_up:
            own.append(seconds)
            if reference_seconds is not None:
                other.append(reference_seconds)
    middle = _quantile(other, 0.5) if other else None
    return Timing(what=what, median=_quantile(own, 0.5), p90=_quantile(own, 0.9), reference=middle)


def device_name(device: torch.device) -> str:
    """The device's name for reports: that of the GPU, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({_processor()}, {threads} thread{'s' if threads > 1 else ''})"


def _seconds(run: Pass, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def _fake_text(sampler: Sampler) -> Iterator[None]:
    """Inside, the sampler's tokenizer is FakeText, so that prompts have exactly the target's number of tokens."""
    kept, sampler.text = sampler.text, FakeText()
    try:
        yield
    finally:
        sampler.text = kept


def _passes(target: Target) -> dict[str, Callable[[Sampler, Target], Pass]]:
    draws = any(task != "understand" for task in target.tasks)
    writes = any(task in ("understand", "think") for task in target.tasks)
    passes: dict[str, Callable[[Sampler, Target], Pass]] = {STEP: _step, IMAGE: _image} if draws else {}
    return passes | ({FIRST_TOKEN: _first_token, TOKEN: _token} if writes else {})


def _read(sampler: Sampler, target: Target, output: Literal["image", "text"]) -> Branches:
    branches = Branches(sampler)
    sampler.read(branches, [[text_of(target.sizes.prompt_tokens)]], output)
    return branches


def _step(sampler: Sampler, target: Target) -> Pass:
    grid, width = sampler.grid(target.sizes.image), sampler.bagel.config.latent_width
    flow = target.speed.applied(FLOW)
    drawing = Drawing(_read(sampler, target, "image"), [grid], flow, sampler.schedule(flow))
    x = sampler.start(sampler.normal((grid[0] * grid[1], width), sampler.generator(0)))
    return lambda: sampler.step(drawing, StepInput(0, drawing.times[0], x))


def _image(sampler: Sampler, target: Target) -> Pass:
    prompt = text_of(target.sizes.prompt_tokens)
    flow = target.speed.applied(FLOW)
    return lambda: sampler.run([prompt], size=target.sizes.image, flow=flow)


def _first_token(sampler: Sampler, target: Target) -> Pass:
    return lambda: sampler.bagel.next_logits(_read(sampler, target, "text").cond, [sampler.text.bos])


def _token(sampler: Sampler, target: Target) -> Pass:
    branches = _read(sampler, target, "text")
    return lambda: sampler.bagel.next_logits(forks(branches.cond), [sampler.text.bos])
