"""The optimisers: Muon for matrices inside the network, AdamW for everything else, and a moving average of the weights.

Muon (Keller Jordan, 2024) replaces a matrix' momentum by the nearest orthogonal matrix, found with five Newton-Schulz
steps; the published coefficients are used, and the update is scaled by 0.2 * sqrt(max side) so that one learning rate
serves both optimisers (Moonlight, 2025). Matrices of one shape are treated as one batch. Convolutions count as matrices
[out, in * 9]. Deterministic on one machine and thread count; the state is plain tensors: training resumes exactly.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up, flat, then a cosine to `floor` over the last `decay` of the steps. Gives a factor of the rate."""

    steps: int
    warmup: int = 100
    decay: float = 0.4
    floor: float = 0.02

    def __call__(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        done = (step - self.steps * (1 - self.decay)) / max(1.0, self.steps * self.decay)
        if done <= 0:
            return rise
        return rise * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Optimizer:
    """Steps named parameters in place. Names in `matrices` go to Muon, the others to AdamW.

    `rates`: factors of the learning rate by name, 1 where there is none.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        matrices: set[str],
        lr: float,
        rates: Mapping[str, float] | None = None,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        momentum: float = 0.95,
    ) -> None:
        self.lr, self.weight_decay, self.betas, self.momentum = lr, weight_decay, betas, momentum
        rates = rates or {}
        self._plain = {n: p for n, p in parameters.items() if n not in matrices}
        self._plain_groups: dict[float, list[str]] = defaultdict(list)
        for name in self._plain:
            self._plain_groups[rates.get(name, 1.0)].append(name)
        self._groups: dict[tuple[int, int, float], dict[str, Tensor]] = defaultdict(dict)
        for name in sorted(matrices):
            p = parameters[name]
            self._groups[p.shape[0], p.numel() // p.shape[0], rates.get(name, 1.0)][name] = p
        self._first = {n: torch.zeros_like(p) for n, p in parameters.items()}
        self._second = {n: torch.zeros_like(p) for n, p in self._plain.items()}
        self._steps = 0

    @torch.no_grad()
    def step(self, factor: float = 1.0, clip: float = 1.0) -> float:
        """One update from the gradients, which are then dropped. Returns their norm before clipping to `clip`."""
        self._steps += 1
        everything = [*self._plain.values(), *(p for g in self._groups.values() for p in g.values())]
        norm = torch.nn.utils.clip_grad_norm_(everything, clip)
        for rate, names in self._plain_groups.items():
            self._adam(names, self.lr * factor * rate)
        for (rows, columns, rate), group in self._groups.items():
            self._muon((rows, columns), group, self.lr * factor * rate)
        for p in everything:
            p.grad = None
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as flat tensors."""
        return {
            "steps": torch.tensor(self._steps),
            **{f"first.{n}": t for n, t in self._first.items()},
            **{f"second.{n}": t for n, t in self._second.items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave, in place."""
        self._steps = int(state["steps"])
        for n, t in self._first.items():
            t.copy_(state[f"first.{n}"])
        for n, t in self._second.items():
            t.copy_(state[f"second.{n}"])

    def _adam(self, candidates: Sequence[str], lr: float) -> None:
        beta1, beta2 = self.betas
        names = [n for n in candidates if self._plain[n].grad is not None]
        params = [self._plain[n] for n in names]
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        first, second = [self._first[n] for n in names], [self._second[n] for n in names]
        if not params:
            return
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, math.sqrt(1 - beta2**self._steps))
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_mul_(params, 1 - lr * self.weight_decay)
        torch._foreach_addcdiv_(params, first, scale, -lr / (1 - beta1**self._steps))

    def _muon(self, shape: tuple[int, int], group: dict[str, Tensor], lr: float) -> None:
        names = [n for n, p in group.items() if p.grad is not None]
        if not names:
            return
        params = [group[n] for n in names]
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        first = [self._first[n] for n in names]
        torch._foreach_lerp_(first, grads, 1 - self.momentum)
        nesterov = torch._foreach_lerp(grads, first, self.momentum)
        update = orthogonalised(torch.stack([u.reshape(shape) for u in nesterov]))
        torch._foreach_mul_(params, 1 - lr * self.weight_decay)
        scale = lr * 0.2 * math.sqrt(max(shape))
        torch._foreach_add_(params, [u.reshape(p.shape) for u, p in zip(update, params, strict=True)], alpha=-scale)


def orthogonalised(batch: Tensor) -> Tensor:
    """[B, m, n] -> nearly orthogonal matrices of the same row and column spaces (singular values about 0.7 to 1.2)."""
    a, b, c = NEWTON_SCHULZ
    wide = batch if batch.shape[1] <= batch.shape[2] else batch.mT
    x = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x if batch.shape[1] <= batch.shape[2] else x.mT


class Average:
    """Exponential moving average of named parameters; the window grows until it has the full length."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._live = list(parameters.values())
        self.values = {n: p.detach().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the parameters. `step` counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), self._live, 1 - decay)
