"""Solvers of the flow's differential equation dx/dt = v(x, t), from t = 1 (noise) down to 0 (data). No array library.

Every solver makes an Euler step; solvers differ only in the velocity they use. For a step from t to t' that follows a
step from s to t:

    euler   v                                        the official sampler; error of order 1 in the step
    ab2     v + (t - t') / (2 (s - t)) (v - v_s)     Adams-Bashforth of order 2 for steps of unequal length
    dpm2    v - h / (2 h_s) (y - y_s) / t            DPM-Solver++(2M): y = x - t v is the data that v points to, and h
                                                     the growth of log((1 - t) / t) over a step
    heun    (v + v') / 2                             v' at the point that Euler reaches; twice the evaluations

ab2 and dpm2 are of order 2 with one evaluation a step. Sources: Hairer, Norsett and Wanner, Solving Ordinary
Differential Equations I, III.5 (variable steps); Lu et al., DPM-Solver++, arXiv 2211.01095, algorithm 2, with
alpha = 1 - t and sigma = t. Where guidance begins or ends the velocity jumps, so a multi-step solver begins anew; the
last step of dpm2 and of heun is Euler's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bagel.settings import FlowSettings
from bagel.step_cache import StepCache

Array = Any


@dataclass(frozen=True, slots=True)
class _Before:
    """The previous step's inputs: its time, x and guided v in fp32, and whether guidance acted."""

    t: float
    x: Array
    v: Array
    guided: bool


class MultiStep:
    """Velocities of ab2 and dpm2 along one path."""

    def __init__(self, solver: str, widen: Callable[[Array], Array]) -> None:
        """`widen` converts an array to fp32 on the device of x."""
        self._velocity = {"ab2": _ab2, "dpm2": _dpm2}.get(solver)
        self._widen = widen
        self._before: _Before | None = None

    def velocity(self, x: Array, v: Array, t: float, t_next: float, guided: bool) -> Array:
        """The velocity for an Euler step from (x, t) to t_next; v, the guided velocity at (x, t), in the first step."""
        before, now = self._before, _Before(t, x, self._widen(v), guided)
        self._before = now
        if self._velocity is None or before is None or before.guided != guided:
            return v
        return self._velocity(now, before, t_next)


class Past:
    """State that one path's steps keep for later steps: the solver's previous step and the step cache."""

    def __init__(self, flow: FlowSettings, widen: Callable[[Array], Array]) -> None:
        self.solver = MultiStep(flow.solver, widen)
        self.cache = StepCache(flow, widen)


def _ab2(now: _Before, before: _Before, t_next: float) -> Array:
    share = (now.t - t_next) / (2 * (before.t - now.t))
    return now.v + (now.v - before.v) * share


def _dpm2(now: _Before, before: _Before, t_next: float) -> Array:
    if before.t >= 1 or t_next <= 0:  # h is infinite there
        return now.v
    share = (_log_snr(t_next) - _log_snr(now.t)) / (2 * (_log_snr(now.t) - _log_snr(before.t)))
    data, data_before = now.x - now.v * now.t, before.x - before.v * before.t
    return now.v - (data - data_before) * (share / now.t)


def _log_snr(t: float) -> float:
    return math.log((1 - t) / t)
