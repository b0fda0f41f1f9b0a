"""Attributes the error of an artifact to its components.

For each component, the reference runs with that component's modules replaced by the artifact's, and everything else
unchanged. Modules are moved by reference, not copied, so no memory is needed beyond the two models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from bagel.model import Bagel
from bagel.sampler import Sampler
from bagel_compress.build.limits import Metric
from bagel_compress.parity import replay
from bagel_compress.parity.distances import measure
from bagel_compress.parity.report_data import ComponentCost
from bagel_compress.parity.trace import Trace

_ATTENTION = r"(?:[qkvo]_proj|[qk]_norm|input_layernorm)"
_MLP = r"(?:(?:gate|up|down)_proj|post_attention_layernorm)"
COMPONENTS = {
    "und attention": rf"layers\.\d+\.und\.{_ATTENTION}",
    "und MLP": rf"layers\.\d+\.und\.{_MLP}",
    "gen attention": rf"layers\.\d+\.gen\.{_ATTENTION}",
    "gen MLP": rf"layers\.\d+\.gen\.{_MLP}",
    "ViT": r"vit",
    "connector": r"connector|vit_pos_embed",
    "embeddings": r"embed_tokens",
    "latent and time": r"vae2llm|llm2vae|latent_pos_embed|time_embedder",
    "head": r"lm_head|norm_und|norm_gen",
}
STEPS, LOGITS = 2, 8  # denoising steps and tokens replayed per case: enough to rank components


def attribute(reference: Sampler, artifact: Sampler, traces: Sequence[Trace]) -> tuple[ComponentCost, ...]:
    """The error that each component causes alone: `velocity.path` and mean KL divergence, means over the cases."""
    shortened = [_shortened(trace) for trace in traces]
    costs = []
    for component, pattern in COMPONENTS.items():
        with borrowed_modules(reference.bagel, artifact.bagel, pattern):
            measured = [measure(trace, replay.replay(reference, trace), None).metrics for trace in shortened]
        costs.append(
            ComponentCost(
                component=component,
                velocity=_mean([m[Metric.VELOCITY_PATH] for m in measured if Metric.VELOCITY_PATH in m]),
                logits=_mean([m[Metric.LOGITS_KL_MEAN] for m in measured if Metric.LOGITS_KL_MEAN in m]),
            )
        )
    return tuple(costs)


@contextmanager
def borrowed_modules(reference: Bagel, artifact: Bagel, pattern: str) -> Iterator[None]:
    """Inside, the reference holds the artifact's modules in place of its own where the path matches `pattern`."""
    paths = [path for path, _ in reference.named_modules() if re.fullmatch(pattern, path)]
    kept = {path: reference.get_submodule(path) for path in paths}
    try:
        for path in paths:
            _put(reference, path, artifact.get_submodule(path))
        yield
    finally:
        for path, module in kept.items():
            _put(reference, path, module)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _shortened(trace: Trace) -> Trace:
    """The trace with its first and middle step, the first logits, and no layer states."""
    steps = trace.steps[:: max(1, len(trace.steps) // STEPS)][:STEPS]
    kept = {
        name: tensor
        for name, tensor in trace.tensors.items()
        if not name.startswith("tap/") and (not name.startswith("step") or int(name[4:].split("/")[0]) in steps)
    }
    if "ids" in kept:
        kept["ids"], kept["logits"] = kept["ids"][:LOGITS], kept["logits"][:LOGITS]
    return replace(trace, tensors=kept)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
