"""Step cache: steps whose velocities are forecast from earlier evaluations in place of a pass of the network.

Two questions, each with its own settings (bagel.settings.FlowSettings):

    when    cache_every k       the network is evaluated at every k-th step
            cache_threshold r   it is evaluated once x has moved by the share r since the last evaluation (the sum of
                                mean |x - x_before| / mean |x_before| over steps), as TeaCache does (arXiv 2411.19108)
            guidance_every k    of the steps with an evaluation, every k-th one evaluates the guidance branches too
    what    cache_order 0..2    the polynomial in t through the last 1, 2 or 3 evaluations, as TaylorSeer forecasts
                                features (arXiv 2503.06923); lower while there are fewer

Kept are velocities, 64 values a token in fp32, not states inside the network: small, and the same on every runtime.
Guidance is never dropped: the branches are kept one by one, the guided ones as differences to the conditional velocity,
and are combined at every step by its own rule. Where a branch begins to count it is evaluated. In a batch the decision
is one for all samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bagel.settings import FlowSettings

Array = Any
Velocities = tuple[Array, Array | None, Array | None]  # cond, text-dropped, image-dropped
Network = Callable[[bool, bool], Velocities]  # whether the text-dropped and the image-dropped branch are wanted
COND, TEXT, IMAGE = "cond", "text", "image"


class StepCache:
    """The velocities of one path's evaluations, newest last."""

    def __init__(self, flow: FlowSettings, widen: Callable[[Array], Array]) -> None:
        """`widen`: an array as fp32 where x is."""
        self._flow, self._widen = flow, widen
        self._past: dict[str, list[tuple[float, Array]]] = {COND: [], TEXT: [], IMAGE: []}
        self._steps = 0  # since the last evaluation
        self._unguided = 0  # evaluations since the last one of the guidance branches
        self._x: Array = None
        self._moved = 0.0

    def velocities(self, network: Network, x: Array, t: float, use_text: bool, use_image: bool) -> Velocities:
        """The wanted velocities at (x, t): of the network, or forecast where the settings say so."""
        if not self._flow.forecasts:
            return network(use_text, use_image)
        due = self._due(x)
        wanted = [name for name, use in ((TEXT, use_text), (IMAGE, use_image)) if use]
        begins = any(not self._past[name] for name in wanted)
        if not (due or begins):
            return self._forecast(self._at(COND, t), t, wanted)
        refresh = bool(wanted) and (begins or self._unguided + 1 >= self._flow.guidance_every)
        found = network(use_text and refresh, use_image and refresh)
        self._keep(t, found)
        self._unguided = 0 if refresh else self._unguided + 1
        return found if refresh or not wanted else self._forecast(found[0], t, wanted)

    def _due(self, x: Array) -> bool:
        """Whether the network must be evaluated at this step; called once a step."""
        if self._flow.cache_threshold:
            if self._x is not None:
                self._moved += float(abs(x - self._x).mean() / abs(self._x).mean())
            self._x = x
            due = not self._past[COND] or self._moved >= self._flow.cache_threshold
        else:
            self._steps += 1
            due = not self._past[COND] or self._steps >= self._flow.cache_every
        return due

    def _keep(self, t: float, found: Velocities) -> None:
        self._steps, self._moved = 0, 0.0
        v = self._widen(found[0])
        kept = {COND: v} | {
            n: self._widen(b) - v for n, b in zip((TEXT, IMAGE), found[1:], strict=True) if b is not None
        }
        for name, value in kept.items():
            self._past[name] = [*self._past[name], (t, value)][-1 - self._flow.cache_order :]

    def _forecast(self, v: Array, t: float, wanted: list[str]) -> Velocities:
        wide = self._widen(v)
        text, image = (wide + self._at(name, t) if name in wanted else None for name in (TEXT, IMAGE))
        return v, text, image

    def _at(self, name: str, t: float) -> Array:
        """The polynomial through what is kept, at time t (Lagrange's form)."""
        past = self._past[name]
        total = None
        for time, value in past:
            weight = 1.0
            for other, _ in past:
                if other != time:
                    weight *= (t - other) / (time - other)
            total = value * weight if total is None else total + value * weight
        return total
