"""Profiles a pass and compares its time with its floor, the time of its matrix products and attention alone.

    step       one conditional pass of a denoising step
    prefill    a picture as clean latent and as ViT features, then a prompt: what an edit reads
    token      one token of text

While the real pass runs once, every product (`F.linear`, or `bagel.one_row` of a token) and attention is recorded with
its inputs. The floor is the time of repeating just those calls; it is measured alternately with the pass. The
difference is spent on norms, rotary positions, residuals, copies, the decoding of coded weights, and Python. The
products of a token have one row, so the least they could take is the time to read their weights, which is measured as
well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function

from bagel.branches import Branches
from bagel.layers import RMSNorm
from bagel.one_row import one_row
from bagel.sampler import Sampler

ATTENTION = "attention"
NORMS = "norms"
REST = "rotary positions, residuals, copies, Python"
KINDS = {
    "q_proj": "q, k, v", "k_proj": "q, k, v", "v_proj": "q, k, v", "o_proj": "o", "gate_proj": "gate, up",
    "up_proj": "gate, up", "down_proj": "down",
}  # fmt: skip
PREFIX = "part: "
PRODUCTS = (F.linear, one_row)


Kind = Literal["step", "prefill", "token"]


@dataclass(frozen=True, slots=True)
class PassProfile:
    """The times of a pass."""

    seconds: float  # of one pass, median
    floor: float  # seconds of its products and attention alone, median
    reading: float  # seconds of reading the weights of its products once, median; 0 where it was not measured
    shares: dict[str, float] = field(default_factory=dict)  # part -> share of the pass's time

    @property
    def ratio(self) -> float:
        """The time of the pass as a multiple of its floor."""
        return self.seconds / self.floor

    @property
    def reads(self) -> float:
        """The time of the pass as a multiple of the time to read its weights."""
        return self.seconds / self.reading


def profile_pass(
    sampler: Sampler, kind: Kind, size: tuple[int, int], prompt: str = "a red cat", repeats: int = 9
) -> PassProfile:
    """Profiles one pass for a picture of `size` (H, W), or for a token.

    On the CPU, times are CPU times of the process, summed over threads, so that other programs disturb them little; on
    CUDA they are wall-clock times with synchronisation. The reading of weights is measured for a token only.
    """
    device = sampler.bagel.device
    with torch.no_grad():
        run = _PASSES[kind](sampler, size, prompt)
        with _CallRecorder() as recorder:
            run()
        calls = recorder.calls
        weights = {args[1].data_ptr(): args[1] for function, args, _ in calls if function in PRODUCTS}
        work: dict[str, Callable[[], object]] = {"pass": run, "floor": lambda: [f(*a, **k) for f, a, k in calls]}
        if kind == "token":
            work["reading"] = lambda: [_read(weight) for weight in weights.values()]
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(repeats + 2):  # the first two warm up
            for name, one in work.items():
                taken = _seconds(one, device)
                if turn >= 2:
                    seconds[name].append(taken)
        middle = {name: _median(values) for name, values in seconds.items()}
        return PassProfile(middle["pass"], middle["floor"], middle.get("reading", 0.0), _shares(sampler, run))


def _read(weight: Tensor) -> Tensor:
    """Reads every byte of a weight once; a sum of 32-bit words is as fast as memory."""
    words = weight.detach().contiguous().view(-1)
    return words[: words.numel() // 2 * 2].view(torch.float32).sum()


def _step(sampler: Sampler, size: tuple[int, int], prompt: str) -> Callable[[], Tensor]:
    branches, grid = Branches(sampler), sampler.grid(size)
    sampler.read(branches, [[prompt]], "image")
    x = sampler.start(sampler.normal((grid[0] * grid[1], sampler.bagel.config.latent_width), sampler.generator(0)))

    def run() -> Tensor:
        block = sampler.bagel.noisy_block(x, torch.tensor(0.5), [grid], sampler.wrap)
        return sampler.bagel.velocity(block, branches.cond)

    return run


def _prefill(sampler: Sampler, size: tuple[int, int], prompt: str) -> Callable[[], None]:
    model, generator = sampler.bagel, sampler.generator(0)
    config = model.config
    latent = sampler.normal((config.latent_channels, *(n // config.vae_downsample for n in size)), generator)
    side = min(*size, config.vit_max_patches * config.vit.patch_size) // config.vit.patch_size * config.vit.patch_size
    pixels = sampler.normal((3, side, side), generator).clamp(-1, 1)

    def run() -> None:
        contexts = [model.new_context()]
        model.prefill_latent(contexts, [latent], sampler.wrap)
        model.prefill_vit(contexts, [pixels], sampler.wrap)
        model.prefill_text(contexts, [sampler.text.turn(prompt)])

    return run


def _token(sampler: Sampler, size: tuple[int, int], prompt: str) -> Callable[[], Tensor]:
    """Every run goes on with the context of the one before."""
    branches = Branches(sampler)
    sampler.read(branches, [[prompt]], "text")
    return lambda: sampler.bagel.next_logits(branches.cond, [sampler.text.bos])


_PASSES: dict[Kind, Callable[[Sampler, tuple[int, int], str], Callable[[], object]]] = {
    "step": _step,
    "prefill": _prefill,
    "token": _token,
}


class _CallRecorder(TorchFunctionMode):
    """Keeps the calls of linear products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (*PRODUCTS, F.scaled_dot_product_attention):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _shares(sampler: Sampler, run: Callable[[], object]) -> dict[str, float]:
    """Part -> share of a pass, from torch's profiler."""
    with _marked(sampler.bagel), profile(activities=[ProfilerActivity.CPU]) as trace, record_function(PREFIX + "pass"):
        run()
    found: dict[str, float] = {}
    for event in trace.key_averages():
        if event.key.startswith(PREFIX):
            found[event.key.removeprefix(PREFIX)] = event.cpu_time_total
        elif event.key == "aten::scaled_dot_product_attention":
            found[ATTENTION] = event.cpu_time_total
    total = found.pop("pass")
    found[REST] = total - sum(found.values())
    return {part: value / total for part, value in sorted(found.items(), key=lambda item: -item[1])}


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Inside, linear modules and norms of the decoder tell the profiler what they are."""
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
