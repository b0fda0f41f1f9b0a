"""Predicts the peak memory of a build on a target, phase by phase, without a GPU.

The real sampler runs over fake tensors of the true shapes (fake_model.py) and every storage that it makes is counted
(memory_tracker.py): caches of all guidance branches, activations, decoded weights. The weights as they are stored and
the CUDA context are added to that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bagel.context import GROW_TOKENS, Context
from bagel.events import Drawing, Listener, Prefill
from bagel.flow import FlowSettings
from bagel.loading import parameter_path
from bagel.sampler import Sampler
from bagel_compress.budgets.fake_model import BuildOutline, UnitOutline, check_sizes, fake_model, scratch_bytes, text_of
from bagel_compress.budgets.memory_tracker import CUDA_ROUNDING, Peak, Tracker
from bagel_compress.budgets.overruns import overruns
from bagel_compress.parity.report_data import BudgetReport, PhaseUse
from bagel_compress.run.target import GIB, MIB, NEEDED, Part, Phase, Target, Task

# What a weight belongs to, by its attribute path in bagel.Bagel; the VAE is a module of its own.
PARTS: tuple[tuple[Part, str], ...] = (
    ("und", r"layers\.\d+\.und\."),
    ("gen", r"layers\.\d+\.gen\."),
    ("embed", r"embed_tokens\."),
    ("head", r"lm_head\."),
    ("vit", r"(vit|connector|vit_pos_embed)\."),
    ("bridges", r""),
)
ALWAYS_PASSED: dict[Task, tuple[Phase, ...]] = {  # of the phases of each task, those with most weights
    "t2i": ("text", "denoise"), "edit": ("vit", "denoise"), "understand": ("vit", "decode"),
    "think": ("decode", "denoise"),
}  # fmt: skip
NAMES = tuple(part for part, _ in PARTS)
# How parts are shown: the bars of a report have one colour for each.
SHOWN: dict[str, tuple[Part, ...]] = {
    "understanding expert": ("und",),
    "generation expert": ("gen",),
    "embeddings and head": ("embed", "head"),
    "ViT, bridges, VAE": ("vit", "bridges", "vae"),
}
CACHES, ACTIVATIONS, CONTEXT = "caches", "activations and scratch", "CUDA context"
EDIT_FLOW = FlowSettings(cfg_img_scale=2.0, cfg_renorm_type="text_channel")
T2I_FLOW = FlowSettings()
STEPS = 2  # points of the schedule: one step, from t = 1, where guidance acts


def predict(build: BuildOutline, target: Target, every_layer: bool = False) -> BudgetReport:
    """Peak memory of every phase of every task of the target. Raises TargetError on sizes the model cannot make.

    `every_layer` makes all layers instead of one of each kind: slower, with the same result.
    """
    check_sizes(build, target.sizes.image)
    with FakeTensorMode():
        model = fake_model(build, every_layer)
        weights = weight_bytes(model.sampler, model.times, model.ring)
        fixed, scratch = fixed_bytes(build.units), scratch_bytes(build)
        phases = tuple(
            _use(task, peak, (weights, fixed), scratch, target, build.config.llm.num_layers)
            for task in target.tasks
            for peak in run_task(model.sampler, task, target, cache_scale=model.cache_scale)
        )
    return judged(build, target, phases)


def judged(build: BuildOutline, target: Target, phases: tuple[PhaseUse, ...]) -> BudgetReport:
    """The phases with the verdict on the target's limits."""
    report = BudgetReport(
        artifact=build.digest,
        name=build.name,
        target=target.name,
        device=target.device.name,
        limit=target.limit,
        phases=phases,
        disk=build.disk,
        disk_limit=target.disk_limit,
    )
    return with_verdict(report, target)


def with_verdict(report: BudgetReport, target: Target) -> BudgetReport:
    """The report with its verdict and advice computed again from its numbers."""
    return report.model_copy(update={"overruns": overruns(report, target), "advice": tuple(_advice(report, target))})


def weight_bytes(sampler: Sampler, times: Mapping[str, int], ring: Tensor | None = None) -> dict[Part, int]:
    """Bytes of weights by part, as the modules hold them, each storage once and rounded as the allocator does.

    `times`: path of a layer -> how many layers it stands for. `ring`: a tensor in the modules that is no weight.
    """
    tracker = Tracker(lambda tensor: "")
    tracker.hold([] if ring is None else [ring])
    found: dict[Part, int] = {}
    for path, tensor in _tensors(sampler.bagel):
        part = _part_of(path)
        many = next((count for layer, count in times.items() if path.startswith(layer)), 1)
        found[part] = found.get(part, 0) + many * tracker.hold([tensor])
    found["vae"] = tracker.hold(tensor for _, tensor in _tensors(sampler.vae))
    return found


def fixed_bytes(units: Sequence[UnitOutline]) -> dict[Part, int]:
    """Bytes by part of the units that stay where they were loaded; each tensor has its share of its unit."""
    found: dict[Part, int] = {}
    for stored in units:
        if stored.codec.movable or not stored.runs_coded:
            continue
        for spec in stored.unit.specs:
            share = round(stored.nbytes * spec.numel / stored.unit.numel)
            part = _part_of(parameter_path(spec.name))
            found[part] = found.get(part, 0) + -(-share // CUDA_ROUNDING) * CUDA_ROUNDING
    return found


def least_bytes(units: Sequence[UnitOutline], target: Target, layers: int) -> int:
    """Bytes that a build holds on the target's GPU at least: weights of the highest phase and the context. No torch."""
    moving, fixed = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0)
    for stored in units:
        numel = stored.unit.numel
        nbytes = stored.nbytes if stored.runs_coded else 2 * numel
        sums = moving if stored.codec.movable or not stored.runs_coded else fixed
        for spec in stored.unit.specs:
            sums[_part_of(parameter_path(spec.name))] += nbytes * spec.numel // numel
    always = sum(fixed.values()) + target.device.context_mib * MIB
    phases = {phase for task in target.tasks for phase in ALWAYS_PASSED[task]}
    return always + max(
        sum(_held(part, moving[part], phase, target.resident(phase), layers) for part in NAMES) for phase in phases
    )


def _part_of(path: str) -> Part:
    """The part that a module or parameter of bagel.Bagel belongs to."""
    return next(part for part, pattern in PARTS if re.match(pattern, path))


def run_task(
    sampler: Sampler, task: Task, target: Target, rounding: int = CUDA_ROUNDING, cache_scale: float = 1.0
) -> list[Peak]:
    """Runs the passes of a task once, on whatever tensors the sampler has, and returns the peak of each phase."""
    size = sampler.bagel.config.llm
    shape = (size.num_layers, 2, size.num_kv_heads, size.head_dim)

    def category(tensor: Tensor) -> str:
        is_cache = tensor.dim() == 5 and (*tensor.shape[:3], tensor.shape[4]) == shape
        return CACHES if is_cache else ACTIVATIONS

    tracker = Tracker(category, rounding, {CACHES: cache_scale})
    tracker.hold(tensor for module in (sampler.bagel, sampler.vae) for _, tensor in _tensors(module))
    with torch.no_grad(), tracker:
        run_passes(sampler, task, target, tracker.enter)
    return tracker.peaks


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def run_passes(sampler: Sampler, task: Task, target: Target, enter: Callable[[str], None]) -> None:
    """One task from its first token to its picture or its last token; `enter` is told each phase as it begins.

    One token, and as many steps as fill the step cache (one without it): the others are alike. The sampler's tokenizer
    is FakeText.
    """
    sizes = target.sizes
    turns: list[str | Image.Image] = [text_of(sizes.prompt_tokens)]
    if task in ("edit", "understand"):
        turns.insert(0, Image.new("RGB", (sizes.input_image[1], sizes.input_image[0])))
    sampler.run(
        turns,
        output="text" if task == "understand" else "image",
        think=task == "think",
        size=sizes.image,
        flow=_fewest_steps(target.speed.applied(EDIT_FLOW if task == "edit" else T2I_FLOW)),
        noise=torch.randn,
        listener=_Phases(sampler, sizes.answer_tokens if task == "understand" else sizes.think_tokens, enter),
    )


def _fewest_steps(flow: FlowSettings) -> FlowSettings:
    """The settings with steps enough to make everything that a step ever keeps, all of them guided."""
    if flow.cache_threshold:  # fake tensors have no values to compare
        flow = replace(flow, cache_threshold=0.0, cache_every=2)
    if not flow.forecasts and flow.solver == "euler":
        return replace(flow, num_timesteps=STEPS)
    evaluations = (flow.cache_order + 1) * flow.guidance_every if flow.forecasts else 2
    return replace(flow, num_timesteps=STEPS + evaluations * flow.cache_every, cfg_interval=(0.0, 1.0))


class _Phases(Listener):
    """Says which phase begins, and makes of a text of so many tokens only its last one."""

    def __init__(self, sampler: Sampler, tokens: int, enter: Callable[[str], None]) -> None:
        self._eos, self._tokens, self._enter = sampler.text.eos, tokens, enter

    def before_encode(self, images: Sequence[Image.Image]) -> None:
        self._enter("vae_encode")

    def before_prefill(self, work: Prefill) -> Prefill:
        self._enter(work.kind)
        return work

    def before_decode(self, contexts: Sequence[Context]) -> None:
        """The caches grow as they would token by token, with zeros in place of what is not computed."""
        self._enter("decode")
        for context in contexts:
            left = self._tokens - 1
            while left > 0:
                count = min(left, GROW_TOKENS)
                context.reserve(count)
                for layer in range(context.layers):
                    for rows in context.keys_values(layer, extra=count):
                        rows[context.length :].zero_()
                context.advance(count, count)
                left -= count

    def logits(self, samples: Sequence[int], logits: Any) -> list[int]:
        return [self._eos] * len(samples)

    def thoughts(self, texts: Sequence[str]) -> list[str]:
        return [text_of(self._tokens)] * len(texts)

    def before_denoise(self, drawing: Drawing) -> None:
        self._enter("denoise")

    def before_picture(self, latents: Sequence[Tensor]) -> Sequence[Tensor]:
        self._enter("vae_decode")
        return latents


def _use(
    task: Task, peak: Peak, weights: tuple[dict[Part, int], dict[Part, int]], scratch: int, target: Target, layers: int
) -> PhaseUse:
    resident = target.resident(cast(Phase, peak.name))
    if target.vae_on_host and peak.name.startswith("vae"):
        peak = Peak(peak.name, 0, {CACHES: peak.by_category.get(CACHES, 0)})
    if target.vae_on_host:
        weights = (weights[0] | {"vae": 0}, weights[1])
    moving, fixed = weights  # units of a codec that is not movable stay where they are (run/offload.py)
    held = {part: _held(part, size, cast(Phase, peak.name), resident, layers) for part, size in moving.items()}
    held |= {part: held.get(part, 0) + size for part, size in fixed.items()}
    parts = {shown: float(sum(held.get(part, 0) for part in own)) for shown, own in SHOWN.items()}
    parts[CACHES] = float(peak.by_category.get(CACHES, 0))
    parts[ACTIVATIONS] = float(peak.by_category.get(ACTIVATIONS, 0) + scratch)
    parts[CONTEXT] = float(target.device.context_mib * MIB)
    return PhaseUse(name=f"{task}: {peak.name.replace('_', ' ')}", parts=parts)


def _held(part: Part, size: int, phase: Phase, resident: tuple[Part, ...] | None, layers: int) -> int:
    """Bytes of a part that are on the GPU in a phase: all, one layer where layers are streamed, or none."""
    if resident is None or part in resident:
        return size
    if part not in NEEDED[phase] or part == "embed":
        return 0
    return -(-size // layers) if part in ("und", "gen") else size


def _advice(report: BudgetReport, target: Target) -> Iterator[str]:
    """Advice on a build that does not fit: parts that could wait in host memory, or a recipe with fewer bits."""
    if report.limit is None or report.peak <= report.limit:
        return
    worst = max(report.phases, key=lambda p: p.total)
    over = worst.total - report.limit
    idle = sum(worst.parts[name] for name in _idle(worst.name)) if target.residency is None else 0.0
    if idle >= over:
        yield (
            f"It would fit if {' and '.join(_idle(worst.name))} ({idle / GIB:.2f} GiB) waited in host memory during"
            " this phase."
        )
    largest = max(("understanding expert", "generation expert"), key=lambda name: worst.parts[name])
    yield (
        f"{over / GIB:.2f} GiB too much; the {largest} is the largest part with {worst.parts[largest] / GIB:.2f} GiB:"
        " a recipe with fewer bits there would save most."
    )


def _idle(phase: str) -> list[str]:
    """Parts, as the report shows them, that a phase does not compute with."""
    name = phase.split(": ")[1]
    if name == "denoise":
        return ["embeddings and head", "ViT, bridges, VAE"]
    if name in ("vae encode", "vae decode"):
        return ["understanding expert", "generation expert", "embeddings and head"]
    return ["generation expert"]
