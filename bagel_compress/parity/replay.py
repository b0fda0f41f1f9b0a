"""Runs the sampler on a case and records its tensors: for the reference's trace, or for a comparison with it.

    record(sampler, case)     free run of the reference                           -> the trace
    replay(sampler, trace)    teacher-forced: every stage gets the reference's input (VAE latents, text prefix,
                              thoughts, x at each step), so that errors do not add up and the faulty stage is found
    rerun(sampler, trace)     free run with the trace's noise and the reference's thoughts: the result a user would get

All three run the sampler with a listener and use the same names for tensors, so that two runs are compared name by
name; a lossless model gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bagel.errors import BagelError
from bagel.events import Drawing, Listener, Prefill, Step, StepInput
from bagel.flow import FlowSettings
from bagel.inputs import to_rgb
from bagel.model import Tap
from bagel.sampler import Result, Sampler, TextSettings
from bagel_compress.build.speed_settings import SpeedPreset
from bagel_compress.errors import BagelCompressError, InputError, TargetError
from bagel_compress.io.pictures import read_picture
from bagel_compress.parity.trace import CaseFacts, Trace, image_tensor
from bagel_compress.run.case import Case

TAPPED_PREFIXES = ("layer", "vit_out", "connector_out", "vae2llm_out", "time_embed")
EVENT_NAMES = {"text": "text", "latent": "vae", "vit": "vit"}  # kind of prefill -> its name in a trace


def record(sampler: Sampler, case: Case, folder: Path) -> Trace:
    """Runs a case freely; `folder` holds its pictures. Raises TargetError on a case that this model cannot run."""
    pictures = [image_tensor(_opened(folder / name, case)) for name in case.pictures]
    return _run_observed(_Recorder(sampler, Trace(case, {f"picture{i}": p for i, p in enumerate(pictures)})))


def replay(sampler: Sampler, trace: Trace) -> Trace:
    """Runs the stages of a trace again, each with the reference's input. Raises TargetError as `record` does."""
    return _run_observed(_Replayer(sampler, trace))


def rerun(sampler: Sampler, trace: Trace, speed: SpeedPreset | None = None) -> Trace:
    """Runs a case freely with the trace's noise and, in think mode, the reference's thoughts before the picture.

    `speed` replaces the solver, number of steps and step cache of the case.
    """
    return _run_observed(_Observer(sampler, trace), speed)


def _run_observed(observer: _Observer, speed: SpeedPreset | None = None) -> Trace:
    flow = FlowSettings(**observer.case.flow.model_dump())
    case, pictures = observer.case, iter(observer.script.series("picture"))
    try:
        with torch.no_grad():
            result = observer.sampler.run(
                [t if isinstance(t, str) else Image.fromarray(next(pictures).numpy()) for t in case.turns],
                output="image" if case.makes_image else "text",
                think=case.think,
                size=case.size,
                flow=flow if speed is None else speed.applied(flow),
                text=TextSettings(max_tokens=case.text.max_tokens),
                seed=case.seed,
                noise=observer.noise,
                listener=observer,
            )
    except BagelCompressError:  # errors of the run-time modules are clear as they are
        raise
    except BagelError as error:
        raise TargetError(f"case {case.name} cannot be run on this model: {error}") from None
    return observer.finished(result)


class _Observer(Listener):
    """Listens to a free run and keeps its tensors under the names of a trace.

    `script` is the trace to follow: it supplies pictures, noise and thoughts. Subclasses replace more by it, or less.
    """

    def __init__(self, sampler: Sampler, script: Trace) -> None:
        self.sampler, self.script, self.case = sampler, script, script.case
        self.found: dict[str, Tensor] = {}
        self.tapping = False
        self._contexts: dict[str, tuple[int, int]] = {}
        self._logits: list[Tensor] = []
        self._draws = self._events = self._latents = 0
        self.passes = 0

    def finished(self, result: Result) -> Trace:
        """The trace of the run that gave this result."""
        if self._logits:
            self.found["logits"] = torch.stack(self._logits)
        if result.image is not None:
            self.found["image"] = image_tensor(result.image)
        facts = CaseFacts(text=self.answer(result), contexts=self._contexts, passes=self.passes)
        return Trace(self.case, self.found, facts)

    def answer(self, result: Result) -> str | None:
        """The text for the trace (by default the model's own); keeps its ids."""
        if result.ids:
            self.found["ids"] = torch.tensor(result.ids)
        return result.text

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """The next recorded draw."""
        return self.script.tensors[self._next_draw()]

    def _next_draw(self) -> str:
        self._draws += 1
        return f"noise{self._draws - 1}"

    def before_prefill(self, work: Prefill) -> Prefill:
        if work.kind == "latent":
            name = f"vae_latent{self._latents}"
            self._latents += 1
            self.found[name] = work.content[0].cpu()
            work = replace(work, content=self.context_latents(name, work.content))
        if work.branch == "cond" and self.tapping:
            self._events += 1
            self._tap_prefill(work, f"{self._events:02d}_{EVENT_NAMES[work.kind]}")
        return work

    def context_latents(self, name: str, latents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The latents that are put into the context; `name` is that of the recorded latent."""
        return latents

    def logits(self, samples: Sequence[int], logits: Tensor) -> list[int] | None:
        if len(self._logits) < self.case.record.logits:
            self._logits.append(logits[0].cpu())
        return None

    def thoughts(self, texts: Sequence[str]) -> Sequence[str]:
        return [self.script.facts.text or ""]

    def before_denoise(self, drawing: Drawing) -> None:
        self._drawing = drawing
        branches = drawing.branches
        named = (("cond", branches.cond), ("text", branches.text_dropped), ("image", branches.image_dropped))
        self._contexts = {name: (c.length, c.rope) for name, [c] in named}

    def after_step(self, step: Step) -> Step:
        self.passes += step.passes
        return step

    def before_picture(self, latents: Sequence[Tensor]) -> Sequence[Tensor]:
        self.found["latent"] = latents[0].cpu()
        return latents

    # --- keeping tensors ----------------------------------------------------------------------------------------------

    def keep(self, step: Step, steps: Sequence[int]) -> None:
        """Keeps a step's tensors. At the first and the middle of `steps` it also keeps layer states, from a second
        pass, since tapping may change the order of rows and so the last bits."""
        for name in ("x", "t", "v_cond", "v_text", "v_image", "v"):
            tensor = getattr(step, name)
            if tensor is not None:
                self.found[f"step{step.index}/{name}"] = tensor.cpu()
        if self.tapping and step.index in (steps[0], steps[len(steps) // 2]):
            work = StepInput(step.index, step.t, step.x, self._tap(f"step{step.index}"))
            self.sampler.velocities(self._drawing, work, False, False)

    def _tap_prefill(self, work: Prefill, event: str) -> None:
        """Keeps layer states from a second pass over forked contexts, so that the run itself is not affected."""
        model, wrap, tap = self.sampler.bagel, self.sampler.wrap, self._tap(event)
        contexts = [c.fork() for c in work.contexts]
        if work.kind == "text":
            model.prefill_text(contexts, work.content, tap)
        elif work.kind == "latent":
            model.prefill_latent(contexts, work.content, wrap, tap)
        else:
            model.prefill_vit(contexts, work.content, wrap, tap)

    def _tap(self, event: str) -> Tap:
        """A function for the model to call with each layer's state; it keeps `record.tap_rows` rows of it."""
        rows = self.case.record.tap_rows

        def keep(name: str, state: Tensor) -> None:
            if name.startswith(TAPPED_PREFIXES):
                self.found[f"tap/{event}/{name}"] = state[_spread(state.shape[0], rows)].cpu()

        return keep


class _Recorder(_Observer):
    """Records the reference: draws noise from the case's seed; the script supplies only the pictures."""

    def __init__(self, sampler: Sampler, script: Trace) -> None:
        super().__init__(sampler, script)
        self.tapping = True
        self._generator = torch.Generator().manual_seed(self.case.seed)
        self._steps = _spread(self.case.flow.num_timesteps - 1, self.case.record.steps)
        self.found |= {name: tensor for name, tensor in script.tensors.items() if name.startswith("picture")}

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        draw = self.found[self._next_draw()] = torch.randn(shape, generator=self._generator)
        return draw

    def thoughts(self, texts: Sequence[str]) -> Sequence[str]:
        return texts

    def after_step(self, step: Step) -> Step:
        if step.index in self._steps and not step.forecast:  # a forecast velocity does not come from the network
            self.keep(step, self._steps)
        return super().after_step(step)


class _Replayer(_Observer):
    """Teacher-forces a run: every stage gets its input from the script; steps and tokens it lacks are skipped."""

    def __init__(self, sampler: Sampler, script: Trace) -> None:
        super().__init__(sampler, script)
        self.tapping = any(name.startswith("tap/") for name in script.tensors)
        self._steps = script.steps

    def answer(self, result: Result) -> str | None:
        return self.script.facts.text

    def context_latents(self, name: str, latents: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self.script.tensors[name].to(latents[0].device)]

    def logits(self, samples: Sequence[int], logits: Tensor) -> list[int] | None:
        super().logits(samples, logits)
        ids = self.script.tensors["ids"][: self.case.record.logits].tolist()
        return [ids[len(self._logits)] if len(self._logits) < len(ids) else self.sampler.text.eos]

    def before_step(self, work: StepInput) -> StepInput | None:
        if work.index not in self._steps:
            return None
        recorded, name = self.script.tensors, f"step{work.index}"
        return replace(work, x=recorded[f"{name}/x"].to(self.sampler.bagel.device), t=recorded[f"{name}/t"])

    def after_step(self, step: Step) -> Step:
        self.keep(step, self._steps)
        return step

    def before_picture(self, latents: Sequence[Tensor]) -> Sequence[Tensor]:
        return super().before_picture([self.script.tensors["latent"].to(self.sampler.bagel.device)])


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the indices 0 .. count-1, evenly spaced, the first and the last included."""
    if wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [0]
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def _opened(path: Path, case: Case) -> Image.Image:
    try:
        return to_rgb(read_picture(path))
    except BagelError as error:
        raise InputError(f"case {case.name}: {error}") from None
