"""Measures the distances between two runs of a case, tensor by tensor. Limits are applied in verdict.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from bagel.flow import schedule
from bagel_compress.build.limits import Metric
from bagel_compress.parity import metrics
from bagel_compress.parity.extremes import largest, smallest
from bagel_compress.parity.report_data import CaseParity, StateDistance, StepDistance, TextPair
from bagel_compress.parity.trace import Trace
from bagel_compress.run.case import Flow, Picture

BRANCHES = {"v_cond": "cond", "v_text": "text", "v_image": "image", "v": "guided"}
SURE_PROBABILITY = 0.5  # the reference counts as sure of a token if it gives it at least this probability
DRIFT_FACTOR = 3.0  # drift begins at a state whose error is more than this times the largest one before it


def measure(reference: Trace, forced: Trace, free: Trace | None) -> CaseParity:
    """Distances of a teacher-forced run and, if given, a free run from the reference's trace."""
    case = reference.case
    steps, states = _steps(forced, reference), _states(forced, reference)
    values: dict[str, float] = {}
    if steps:
        values[Metric.VELOCITY_PATH] = _path(forced, reference)
        values[Metric.VELOCITY_REL_L2] = largest(s.rel_l2 for s in steps)
        values[Metric.VELOCITY_COSINE] = smallest(s.cosine for s in steps)
    values |= _vae(forced, reference) | _logits(forced, reference)
    text = None
    if free is not None:
        values |= picture_distances(free, reference)
        text = _text(free, reference)
    if text is not None:
        values[Metric.TEXT_EXACT] = float(text.exact)
        values[Metric.TEXT_PREFIX] = text.prefix / text.length
    return CaseParity(
        name=case.name,
        kind=("think + " if case.think else "") + case.kind,
        prompt=" ".join("[picture]" if isinstance(t, Picture) else t for t in case.turns),
        metrics=values,
        floor=reference.facts.floor,
        steps=steps,
        states=states,
        drift=first_drift(states),
        text=text,
        has_image="image" in reference.tensors and free is not None,
        input_pictures=len(reference.series("picture")),
    )


def first_drift(states: tuple[StateDistance, ...]) -> str | None:
    """The state where the error begins: "EVENT NAME" of the first whose error jumps.

    States are in the order of events and layers. An error jumps if it is more than DRIFT_FACTOR times the largest one
    before it in the same event, and above 1 %. Without a jump: the first state that differs. None if all are equal.
    """
    first_different = None
    worst: dict[str, float] = {}
    for state in states:
        before = worst.get(state.event)
        where = f"{state.event} {state.name}"
        if state.rel_l2 > 0 and first_different is None:
            first_different = where
        if before is not None and before > 0 and state.rel_l2 > DRIFT_FACTOR * before and state.rel_l2 > 0.01:
            return where
        worst[state.event] = max(worst.get(state.event, 0.0), state.rel_l2)
    return first_different


def spans(flow: Flow, recorded: Sequence[int]) -> dict[int, float]:
    """Recorded step -> the time it stands for: each step's time interval is credited to the nearest recorded step."""
    found = dict.fromkeys(recorded, 0.0)
    times = schedule(flow.num_timesteps, flow.timestep_shift).tolist()
    for index, (start, end) in enumerate(pairwise(times)):
        found[min(recorded, key=lambda step: abs(step - index))] += start - end
    return found


def _path(found: Trace, reference: Trace) -> float:
    """Sum over the recorded steps of |error of the guided velocity| times time, relative to the length of the path."""
    error, length = 0.0, 0.0
    for step, time in spans(reference.case.flow, reference.steps).items():
        wanted = reference.tensors[f"step{step}/v"].double()
        error += time * (found.tensors[f"step{step}/v"].double() - wanted).norm().item()
        length += time * wanted.norm().item()
    return error / length if length else 0.0


def _steps(found: Trace, reference: Trace) -> tuple[StepDistance, ...]:
    errors = []
    for index in reference.steps:
        t = float(reference.tensors[f"step{index}/t"])
        for tensor, branch in BRANCHES.items():
            name = f"step{index}/{tensor}"
            if name in reference.tensors and name in found.tensors:
                a, b = found.tensors[name], reference.tensors[name]
                rel_l2, cosine = metrics.rel_l2(a, b), metrics.cosine(a, b)
                errors.append(StepDistance(step=index, t=t, branch=branch, rel_l2=rel_l2, cosine=cosine))
    return tuple(errors)


def _states(found: Trace, reference: Trace) -> tuple[StateDistance, ...]:
    names = sorted((n for n in reference.tensors if n.startswith("tap/") and n in found.tensors), key=_event_order)
    return tuple(
        StateDistance(
            event=name.split("/")[1],
            name=name.split("/")[2],
            rel_l2=metrics.rel_l2(found.tensors[name], reference.tensors[name]),
        )
        for name in names
    )


def _event_order(name: str) -> tuple[int, int, int, str]:
    """Sort key of a state's name: events of the contexts, then denoising steps; within an event, stages before the
    layers, then layers."""
    _, event, state = name.split("/")
    step = event.startswith("step")
    number = int(event.removeprefix("step")) if step else int(event.split("_")[0])
    layer = int(state.removeprefix("layer")) if state.startswith("layer") else -1
    return int(step), number, layer, state


def _vae(found: Trace, reference: Trace) -> dict[str, float]:
    values: dict[str, float] = {}
    pairs = list(zip(found.series("vae_latent"), reference.series("vae_latent"), strict=False))
    if pairs:
        values[Metric.VAE_REL_L2] = largest(metrics.rel_l2(a, b) for a, b in pairs)
    if "image" in found.tensors and "image" in reference.tensors:
        values[Metric.VAE_PSNR] = metrics.psnr(found.tensors["image"], reference.tensors["image"])
    return values


def _logits(found: Trace, reference: Trace) -> dict[str, float]:
    if "logits" not in reference.tensors or "logits" not in found.tensors:
        return {}
    a, b = found.tensors["logits"], reference.tensors["logits"]
    count = min(a.shape[0], b.shape[0])
    a, b = a[:count].double(), b[:count].double()
    next_ids = torch.cat([reference.tensors["ids"][1 : count + 1], b[-1:].argmax(-1)])[:count]
    divergence = metrics.kl_divergence(a, b)
    sure = b.softmax(-1).max(-1).values >= SURE_PROBABILITY
    values: dict[str, float] = {
        Metric.LOGITS_KL_MEAN: divergence.mean().item(),
        Metric.LOGITS_KL_P999: divergence.quantile(0.999).item(),
        Metric.LOGITS_TOP1: metrics.top1(a, b),
        Metric.LOGITS_PPL_RATIO: metrics.perplexity_ratio(a, b, next_ids),
        Metric.LOGITS_REL_L2: metrics.rel_l2(a, b),
    }
    return ({Metric.LOGITS_TOP1_SURE: metrics.top1(a[sure], b[sure])} if sure.any() else {}) | values


def picture_distances(free: Trace, reference: Trace) -> dict[str, float]:
    """Distances of a free run's latent and picture from the reference's; empty if the case draws no picture."""
    if "image" not in reference.tensors:
        return {}
    a, b = free.tensors["image"], reference.tensors["image"]
    noise, latent = reference.series("noise")[-1], reference.tensors["latent"]
    return {
        Metric.LATENT_PATH: metrics.rel_l2(free.tensors["latent"] - noise, latent - noise),
        Metric.IMAGE_PSNR: metrics.psnr(a, b),
        Metric.IMAGE_SSIM: metrics.ssim(a, b),
        Metric.IMAGE_MS_SSIM: metrics.ms_ssim(a, b),
        Metric.IMAGE_COSINE: metrics.cosine(a, b),
        Metric.IMAGE_REL_L2: metrics.rel_l2(a, b),
        Metric.IMAGE_MAE: metrics.mae(a, b),
    }


def _text(free: Trace, reference: Trace) -> TextPair | None:
    if "ids" not in reference.tensors:
        return None
    found, wanted = free.tensors["ids"].tolist(), reference.tensors["ids"].tolist()
    prefix = metrics.common_prefix(found, wanted)
    exact = found == wanted
    texts = (reference.facts.text or "", free.facts.text or "")
    return TextPair(reference=texts[0], found=texts[1], exact=exact, prefix=prefix, length=len(wanted))
