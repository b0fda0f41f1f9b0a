"""Recognises known faults of a compressed model, and describes each in one sentence.

A broken limit only shows that something is wrong; a diagnosis names the cause. Each function looks for one kind of
fault. "Found" are the values of the compressed model, "reference" those of the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from bagel_compress.build.limits import Limit, Metric
from bagel_compress.codecs.base import Codec
from bagel_compress.parity import metrics
from bagel_compress.parity.extremes import largest
from bagel_compress.parity.report_data import ModuleDistance
from bagel_compress.parity.trace import Trace

# A module counts as saturated if its error is this many times the median of its format and its gain is below 1.
SATURATION_FACTOR = 3.0
SAME_COSINE = 0.98  # outputs with a larger cosine are taken for the same module's (NF4 reaches 0.995 on normal weights)
PIXEL_MIDDLE = 127.5
STANDARD_ERRORS = 2.0  # half width of a 95 % interval


def modules(
    found: Mapping[str, Tensor], reference: Mapping[str, Tensor], codecs: Mapping[str, Codec]
) -> tuple[ModuleDistance, ...]:
    """Distance of every linear module's outputs for the fixed inputs of `linear_probes`, without the bias."""
    return tuple(
        ModuleDistance(
            module=path,
            codec=codecs[path].format if path in codecs else "",
            rel_l2=metrics.rel_l2(_without_bias(found[path]), _without_bias(reference[path])),
            gain=metrics.gain(_without_bias(found[path]), _without_bias(reference[path])),
        )
        for path in reference
        if path in found
    )


@dataclass(frozen=True, slots=True)
class Probes:
    """Outputs of linear modules, by path, for the fixed probe inputs and for recorded inputs of the module itself.

    Row 0 of each tensor is the output for an all-zero input: the bias.
    """

    fixed: Mapping[str, Tensor]
    own: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def for_gains(self) -> Mapping[str, Tensor]:
        """The outputs that gains are computed from: for a module's own inputs, or for the fixed ones if it has none."""
        return {**self.fixed, **self.own}


def probe_values(found: Probes, reference: Probes) -> dict[str, float]:
    """The two probe metrics that have limits: the largest significant deviation of a gain from 1, and the largest
    difference of a bias."""
    gains = [gain.deviation for gain in _group_gains(found.for_gains, reference.for_gains).values()]
    both = found.fixed.keys() & reference.fixed.keys()
    biases = [metrics.max_abs(found.fixed[path][0], reference.fixed[path][0]) for path in both]
    return {Metric.LINEAR_GAIN: largest([0.0, *gains]), Metric.LINEAR_BIAS: largest([0.0, *biases])}


def diagnose_modules(
    probes: Probes, wanted: Probes, codecs: Mapping[str, Codec], gain_limit: Limit | None
) -> list[str]:
    """Faults of linear modules: bias, swapped experts, saturation, a format that is not in effect, a wrong scale.

    `probes` are the compressed model's, `wanted` the reference's; `codecs` gives the codec of each compressed module.
    """
    found, reference = probes.fixed, wanted.fixed
    errors = {m.module: m for m in modules(found, reference, codecs)}
    faults = [*_biases(found, reference), *_swapped(found, reference), *_not_in_effect(errors, codecs)]
    saturated = list(_saturated(errors, codecs))
    faults += [s for _, s in saturated]
    named = {path for path, _ in saturated} | {p for p in errors if any(f"{_owner(p)} " in f for f in faults)}
    faults += _scales(probes.for_gains, wanted.for_gains, gain_limit, named)
    return faults


def diagnose_case(found: Trace, reference: Trace) -> list[str]:
    """Faults outside the linear modules: contexts, guidance branches, VAE. `found` is a teacher-forced run."""
    where = f"case {reference.case.name}: "
    faults = [*_contexts(found, reference), *_branches(found, reference), *_vae(found, reference)]
    return [where + fault for fault in faults]


# --- modules ----------------------------------------------------------------------------------------------------------


def _without_bias(answers: Tensor) -> Tensor:
    return answers[1:].double() - answers[:1].double()


def _owner(path: str) -> str:
    """The group of modules that share a gain: a layer's expert, a ViT layer, or the module itself elsewhere."""
    match = re.match(r"(layers\.\d+\.(?:und|gen)|vit\.layers\.\d+)\.", path)
    return match[1] if match else path


@dataclass(frozen=True, slots=True)
class _Gain:
    """The gain of a group of modules, and its standard error, which is large for small modules."""

    value: float
    error: float

    @property
    def deviation(self) -> float:
        """The distance of the gain from 1 beyond its confidence interval; 0 inside it."""
        return largest((0.0, abs(self.value - 1.0) - STANDARD_ERRORS * self.error))


def _group_gains(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, _Gain]:
    """Gain of each group (`_owner`), pooled over its modules, since the gain of one small module is too noisy."""
    groups: dict[str, list[str]] = {}
    for path in reference:
        if path in found:
            groups.setdefault(_owner(path), []).append(path)
    return {
        owner: _gain(torch.cat([_products(found[path], reference[path]) for path in paths]))
        for owner, paths in groups.items()
    }


def _products(found: Tensor, reference: Tensor) -> Tensor:
    """For each output row <found, reference> and <reference, reference>, [N, 2].

    Both are divided by the mean square of the reference, so that a module counts in proportion to its output width.
    """
    a, b = _without_bias(found), _without_bias(reference)
    return torch.stack([(a * b).sum(-1), (b * b).sum(-1)], -1) / b.square().mean().clamp(min=1e-30)


def _gain(products_N2: Tensor) -> _Gain:
    crossed, own = products_N2.unbind(-1)
    total = own.sum()
    if total == 0:  # all weights are zero, and no gain is defined; the bias is checked on its own
        return _Gain(1.0, 0.0)
    value = crossed.sum() / total
    return _Gain(value.item(), ((crossed - value * own).norm() / total).item())


def _biases(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Iterator[str]:
    for path, wanted in reference.items():
        if path not in found or not wanted[0].any():
            continue
        if not found[path][0].any():
            yield f"{path} lost its bias: its output for zeros is zero, the reference's is not."
        elif metrics.rel_l2(found[path][0], wanted[0]) > 0.01:
            yield f"{path} has another bias: it is off by {metrics.rel_l2(found[path][0], wanted[0]):.0%}."


def _swapped(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Iterator[str]:
    layers: dict[str, list[bool]] = {}
    for path, wanted in reference.items():
        if ".und." not in path:
            continue
        other = path.replace(".und.", ".gen.")
        if path not in found or other not in found or wanted.shape != reference[other].shape:
            continue
        crossed = metrics.cosine(_without_bias(found[path]), _without_bias(reference[other])) > SAME_COSINE
        straight = metrics.cosine(_without_bias(found[path]), _without_bias(wanted)) > SAME_COSINE
        layers.setdefault(path.split(".und.")[0], []).append(crossed and not straight)
    for layer, swaps in layers.items():
        if all(swaps):
            yield f"{layer}.und and {layer}.gen are swapped: each gives the outputs of the other one's reference."
        elif any(swaps):
            yield f"{layer}: {sum(swaps)} modules of the two experts are swapped."


def _not_in_effect(errors: Mapping[str, ModuleDistance], codecs: Mapping[str, Codec]) -> Iterator[str]:
    for path, error in errors.items():
        codec = codecs.get(path)
        if codec is not None and not codec.lossless and error.rel_l2 == 0.0:
            form = codec.format
            yield f"{path} is not compressed: the recipe says {form}, but its outputs equal the source's exactly."


def _saturated(errors: Mapping[str, ModuleDistance], codecs: Mapping[str, Codec]) -> Iterator[tuple[str, str]]:
    by_format: dict[str, list[ModuleDistance]] = {}
    for error in errors.values():
        by_format.setdefault(error.codec, []).append(error)
    for codec, group in by_format.items():
        usual = median(e.rel_l2 for e in group)
        for e in group:
            if e.rel_l2 > SATURATION_FACTOR * max(usual, 1e-3) and 0.3 < e.gain < 0.99 and codec:
                times = e.rel_l2 / max(usual, 1e-9)
                yield (
                    e.module,
                    f"{e.module} is saturated: its error of {e.rel_l2:.1%} is {times:.0f} times that of the other"
                    f" {codec} modules, and its gain is {e.gain:.3f}.",
                )


def _scales(
    found: Mapping[str, Tensor], reference: Mapping[str, Tensor], limit: Limit | None, named: set[str]
) -> Iterator[str]:
    explained = {_owner(path) for path in named}
    for owner, gain in _group_gains(found, reference).items():
        if limit is not None and not limit.holds(gain.deviation) and owner not in explained:
            yield f"{owner} has a wrong scale: its outputs are {gain.value:.4f} times the reference's."


# --- sampler ----------------------------------------------------------------------------------------------------------


def _contexts(found: Trace, reference: Trace) -> Iterator[str]:
    for branch, (length, rope) in reference.facts.contexts.items():
        length_found, rope_found = found.facts.contexts.get(branch, (0, 0))
        if (length_found, rope_found) == (length, rope):
            continue
        thoughts = (
            "; the thoughts are missing" if branch == "cond" and reference.case.think and length_found < length else ""
        )
        yield (
            f"the {branch} context holds {length_found} tokens at position {rope_found}, the reference's {length} at"
            f" {rope}{thoughts}."
        )


def _branches(found: Trace, reference: Trace) -> Iterator[str]:
    """A guidance branch whose velocity is the conditional one at every step, while the reference's is not."""
    for name, branch in (("v_text", "text-dropped"), ("v_image", "image-dropped")):
        same, different = 0, 0
        for index in reference.steps:
            key, cond = f"step{index}/{name}", f"step{index}/v_cond"
            if key not in reference.tensors or torch.equal(reference.tensors[key], reference.tensors[cond]):
                continue
            different += 1
            same += key in found.tensors and metrics.rel_l2(found.tensors[key], found.tensors[cond]) < 1e-6
        if different and same == different:
            yield f"the {branch} branch gives the conditional velocity at every step: its context was not forked."


def _vae(found: Trace, reference: Trace) -> Iterator[str]:
    pairs = zip(found.series("vae_latent"), reference.series("vae_latent"), strict=False)
    for index, (a, b) in enumerate(pairs):
        if metrics.rel_l2(a, b) > 0.05:
            yield f"the VAE encodes picture {index} to {metrics.gain(a, b):.3f} times the reference's latent."
    if "image" in reference.tensors and "image" in found.tensors:
        a, b = (t.tensors["image"].double() - PIXEL_MIDDLE for t in (found, reference))
        if metrics.rel_l2(a, b) > 0.05:
            yield (
                "the VAE decodes the recorded latent to another picture"
                f" (PSNR {metrics.psnr(found.tensors['image'], reference.tensors['image']):.1f} dB,"
                f" contrast {metrics.gain(a, b):.2f} times): its weights or its scale differ."
            )
