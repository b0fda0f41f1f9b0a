"""Predicts the peak memory of a build on a target, phase by phase, without a GPU.

The real sampler runs over fake tensors of the true shapes (fake_model.py), and every storage that it allocates is
counted (memory_tracker.py): caches of all guidance branches, activations, decoded weights. The stored weights and the
CUDA context are added.
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

# Part of the model -> pattern of the attribute paths of its weights in bagel.Bagel. The VAE is not in Bagel.
PARTS: tuple[tuple[Part, str], ...] = (
    ("und", r"layers\.\d+\.und\."),
    ("gen", r"layers\.\d+\.gen\."),
    ("embed", r"embed_tokens\."),
    ("head", r"lm_head\."),
    ("vit", r"(vit|connector|vit_pos_embed)\."),
    ("bridges", r""),
)
HEAVIEST_PHASES: dict[Task, tuple[Phase, ...]] = {  # the phases of each task that use most weights
    "t2i": ("text", "denoise"), "edit": ("vit", "denoise"), "understand": ("vit", "decode"),
    "think": ("decode", "denoise"),
}  # fmt: skip
NAMES = tuple(part for part, _ in PARTS)
# Name in reports -> the parts that it sums up; each has a colour in the bars of a report.
SHOWN: dict[str, tuple[Part, ...]] = {
    "understanding expert": ("und",),
    "generation expert": ("gen",),
    "embeddings and head": ("embed", "head"),
    "ViT, bridges, VAE": ("vit", "bridges", "vae"),
}
CACHES, ACTIVATIONS, CONTEXT = "caches", "activations and scratch", "CUDA context"
EDIT_FLOW = FlowSettings(cfg_img_scale=2.0, cfg_renorm_type="text_channel")
T2I_FLOW = FlowSettings()
STEPS = 2  # points of the schedule, so that there is one step, from t = 1, where guidance is on


def predict(build: BuildOutline, target: Target, every_layer: bool = False) -> BudgetReport:
    """Predicts the peak memory of every phase of every task of the target.

    `every_layer` makes all layers instead of a few of each kind: slower, with the same result. Raises TargetError on a
    picture size that the model cannot draw.
    """
    check_sizes(build, target.sizes.image)
    with FakeTensorMode():
        model = fake_model(build, every_layer)
        weights = weight_bytes(model.sampler, model.times, model.ring)
        fixed, scratch = fixed_bytes(build.units), scratch_bytes(build)
        phases = tuple(
            _phase_use(task, peak, (weights, fixed), scratch, target, build.config.llm.num_layers)
            for task in target.tasks
            for peak in run_task(model.sampler, task, target, cache_scale=model.cache_scale)
        )
    return budget_report(build, target, phases)


def budget_report(build: BuildOutline, target: Target, phases: tuple[PhaseUse, ...]) -> BudgetReport:
    """A report of these phases, with the target's limits applied."""
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
    """The report with its overruns and advice computed again from its numbers."""
    return report.model_copy(update={"overruns": overruns(report, target), "advice": tuple(_advice(report, target))})


def weight_bytes(sampler: Sampler, times: Mapping[str, int], ring: Tensor | None = None) -> dict[Part, int]:
    """Bytes of the modules' weights by part; each storage counts once, rounded up as the allocator does.

    `times` maps the path of a layer to the number of layers it stands for. `ring` is scratch memory that the modules
    refer to; it is not counted.
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
    """Bytes by part of the units that are not movable; a unit's bytes are divided among its tensors by their size."""
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
    """A lower bound on the bytes that a build needs on the target's GPU: weights of the heaviest phase, CUDA context.

    It needs no torch, and rules out builds quickly.
    """
    moving, fixed = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0)
    for stored in units:
        numel = stored.unit.numel
        nbytes = stored.nbytes if stored.runs_coded else 2 * numel
        sums = moving if stored.codec.movable or not stored.runs_coded else fixed
        for spec in stored.unit.specs:
            sums[_part_of(parameter_path(spec.name))] += nbytes * spec.numel // numel
    always = sum(fixed.values()) + target.device.context_mib * MIB
    phases = {phase for task in target.tasks for phase in HEAVIEST_PHASES[task]}
    return always + max(
        sum(_bytes_on_gpu(part, moving[part], phase, target.resident(phase), layers) for part in NAMES)
        for phase in phases
    )


def _part_of(path: str) -> Part:
    """The part that a module or parameter of bagel.Bagel belongs to."""
    return next(part for part, pattern in PARTS if re.match(pattern, path))


def run_task(
    sampler: Sampler, task: Task, target: Target, rounding: int = CUDA_ROUNDING, cache_scale: float = 1.0
) -> list[Peak]:
    """Runs the passes of a task once, on the sampler's tensors, fake or real. Returns the peak of each phase."""
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
    """Runs one task from its first token to its picture or last token; calls `enter` with each phase as it begins.

    Only the last token of a text is computed, and only as many denoising steps as fill the step cache (one without
    it), since the others need the same memory. The sampler's tokenizer has to be FakeText.
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
    """The settings with the fewest steps after which everything that a step may keep is allocated, all guided."""
    if flow.cache_threshold:  # fake tensors have no values to compare
        flow = replace(flow, cache_threshold=0.0, cache_every=2)
    if not flow.forecasts and flow.solver == "euler":
        return replace(flow, num_timesteps=STEPS)
    evaluations = (flow.cache_order + 1) * flow.guidance_every if flow.forecasts else 2
    return replace(flow, num_timesteps=STEPS + evaluations * flow.cache_every, cfg_interval=(0.0, 1.0))


class _Phases(Listener):
    """Calls `enter` as each phase begins, and has only the last of `tokens` tokens of a text computed."""

    def __init__(self, sampler: Sampler, tokens: int, enter: Callable[[str], None]) -> None:
        self._eos, self._tokens, self._enter = sampler.text.eos, tokens, enter

    def before_encode(self, images: Sequence[Image.Image]) -> None:
        self._enter("vae_encode")

    def before_prefill(self, work: Prefill) -> Prefill:
        self._enter(work.kind)
        return work

    def before_decode(self, contexts: Sequence[Context]) -> None:
        """Grows the caches as decoding token by token would, with zeros for the tokens that are not computed."""
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


def _phase_use(
    task: Task, peak: Peak, weights: tuple[dict[Part, int], dict[Part, int]], scratch: int, target: Target, layers: int
) -> PhaseUse:
    """The predicted use of one phase. `weights` are the bytes by part of all units, and of those that cannot move."""
    resident = target.resident(cast(Phase, peak.name))
    if target.vae_on_host and peak.name.startswith("vae"):
        peak = Peak(peak.name, 0, {CACHES: peak.by_category.get(CACHES, 0)})
    if target.vae_on_host:
        weights = (weights[0] | {"vae": 0}, weights[1])
    moving, fixed = weights  # units of a codec that is not movable always stay on the GPU (run/offload.py)
    held = {part: _bytes_on_gpu(part, size, cast(Phase, peak.name), resident, layers) for part, size in moving.items()}
    held |= {part: held.get(part, 0) + size for part, size in fixed.items()}
    parts = {shown: float(sum(held.get(part, 0) for part in own)) for shown, own in SHOWN.items()}
    parts[CACHES] = float(peak.by_category.get(CACHES, 0))
    parts[ACTIVATIONS] = float(peak.by_category.get(ACTIVATIONS, 0) + scratch)
    parts[CONTEXT] = float(target.device.context_mib * MIB)
    return PhaseUse(name=f"{task}: {peak.name.replace('_', ' ')}", parts=parts)


def _bytes_on_gpu(part: Part, size: int, phase: Phase, resident: tuple[Part, ...] | None, layers: int) -> int:
    """Bytes of a part (`size` in all) on the GPU in a phase: all, one layer if layers are streamed, or none."""
    if resident is None or part in resident:
        return size
    if part not in NEEDED[phase] or part == "embed":
        return 0
    return -(-size // layers) if part in ("und", "gen") else size


def _advice(report: BudgetReport, target: Target) -> Iterator[str]:
    """Sentences for a build that does not fit: parts that could wait in host memory, or a recipe with fewer bits."""
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
    """The parts, by their names in reports, that a phase does not use."""
    name = phase.split(": ")[1]
    if name == "denoise":
        return ["embeddings and head", "ViT, bridges, VAE"]
    if name in ("vae encode", "vae decode"):
        return ["understanding expert", "generation expert", "embeddings and head"]
    return ["generation expert"]
