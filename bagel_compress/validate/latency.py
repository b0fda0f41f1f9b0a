"""Times of a loaded model: seconds per denoising step and per token, beside the reference in the same process.

Warm-up first, the device synchronised around every pass, median and 90 % quantile of the repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bagel.sampler import Sampler
from bagel_compress.reports import Timing

WARM_UP, REPEATS = 2, 7
CONTEXT_TOKENS = 64  # of the prompt that passes are timed after


def timings(sampler: Sampler, reference: Sampler | None = None) -> tuple[Timing, ...]:
    """Seconds of a denoising step (one conditional pass) at the model's largest size and of one decoded token.

    With `reference`, the same passes of the full-precision model, taken in turns in the same process.
    """
    return tuple(
        timed(what, make(sampler), make(reference) if reference is not None else None, sampler.bagel.device)
        for what, make in (("denoising step", _step), ("decoded token", _token), ("time to first token", _first_token))
    )


def timed(what: str, run: Callable[[], object], reference: Callable[[], object] | None, device: torch.device) -> Timing:
    """Median and 90 % quantile of a call; the reference's calls are taken between, so both see the same machine."""
    own, other = [], []
    for repeat in range(WARM_UP + REPEATS):
        seconds = _seconds(run, device)
        reference_seconds = None if reference is None else _seconds(reference, device)
        if repeat >= WARM_UP:
            own.append(seconds)
            if reference_seconds is not None:
                other.append(reference_seconds)
    middle = _quantile(other, 0.5) if other else None
    return Timing(what=what, median=_quantile(own, 0.5), p90=_quantile(own, 0.9), reference=middle)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
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


def _context(sampler: Sampler) -> list:  # type: ignore[type-arg]
    contexts = [sampler.bagel.new_context()]
    sampler.bagel.prefill_text(contexts, [[sampler.text.bos] * CONTEXT_TOKENS])
    return contexts


def _step(sampler: Sampler) -> Callable[[], object]:
    contexts, side = _context(sampler), sampler.bagel.config.max_latent_size
    x = torch.randn(side * side, sampler.bagel.config.latent_width).to(sampler.bagel.device)
    t = torch.tensor(0.5)
    return lambda: sampler.bagel.velocity(sampler.bagel.noisy_block(x, t, [(side, side)], sampler.wrap), contexts)


def _token(sampler: Sampler) -> Callable[[], object]:
    contexts = _context(sampler)
    return lambda: sampler.bagel.next_logits([c.fork() for c in contexts], [sampler.text.bos])


def _first_token(sampler: Sampler) -> Callable[[], object]:
    return lambda: sampler.bagel.next_logits(_context(sampler), [sampler.text.bos])
