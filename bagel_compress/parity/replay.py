"""Watching the sampler at work on a case: for a trace of the reference, and again, in the same words, for a comparison.

    record(sampler, case)     free: what the model does by itself               -> the trace
    replay(sampler, trace)    teacher-forced: every stage is given what the reference had before it (VAE latents, text
                              prefix, thoughts, x at each step), so that errors do not pile up and the stage is found
    rerun(sampler, trace)     free, with the trace's noise and the reference's thoughts: what a person would see

All three go through one function and name their tensors alike, so that comparing is done name by name and a lossless
model gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from bagel.context import Context
from bagel.errors import BagelError
from bagel.flow import FlowSettings, guide
from bagel.inputs import to_rgb
from bagel.model import Tap
from bagel.sampler import Branches, Sampler, Step, TextSettings
from bagel_compress.errors import BagelCompressError, InputError, TargetError
from bagel_compress.parity.trace import Facts, Trace, image_tensor
from bagel_compress.run.case import Case

TAPPED_PREFIXES = ("layer", "vit_out", "connector_out", "vae2llm_out", "time_embed")
Mode = Literal["record", "replay", "rerun"]


def record(sampler: Sampler, case: Case, folder: Path) -> Trace:
    """Runs a case; `folder` holds its pictures. Raises TargetError on a case that this model cannot run."""
    pictures = [image_tensor(_opened(folder / name, case)) for name in case.pictures]
    return _observe(sampler, Trace(case, {f"picture{i}": p for i, p in enumerate(pictures)}), "record")


def replay(sampler: Sampler, trace: Trace) -> Trace:
    """The same stages as in the trace, each one fed with what the reference had."""
    return _observe(sampler, trace, "replay")


def rerun(sampler: Sampler, trace: Trace) -> Trace:
    """A free run with the trace's noise and, in think mode, the reference's thoughts before the picture."""
    return _observe(sampler, trace, "rerun")


def _observe(sampler: Sampler, script: Trace, mode: Mode) -> Trace:
    try:
        return _Observer(sampler, script, mode).run()
    except BagelCompressError:  # what the runtime refuses says so itself
        raise
    except BagelError as error:
        raise TargetError(f"case {script.case.name} cannot be run on this model: {error}") from None


class _Observer:
    """One pass over a case. `script` is the trace to follow, or just the pictures when recording."""

    def __init__(self, sampler: Sampler, script: Trace, mode: Mode) -> None:
        self.sampler, self.script, self.mode, self.case = sampler, script, mode, script.case
        self.found: dict[str, Tensor] = {}
        self.answer: str | None = None  # the text the model came to by itself; the script's when it was fed
        self._generator = torch.Generator().manual_seed(self.case.seed)
        self._draws = 0
        self.tapping = mode == "record" or (mode == "replay" and any(n.startswith("tap/") for n in script.tensors))

    @torch.no_grad()
    def run(self) -> Trace:
        case, sampler = self.case, self.sampler
        branches = _Watched(sampler, self)
        grid = sampler.grid(case.size) if case.size else None
        pictures = iter(self.script.series("picture"))
        turns = [t if isinstance(t, str) else Image.fromarray(next(pictures).numpy()) for t in case.turns]
        last = sampler.read(branches, turns, "image" if case.makes_image else "text", case.think, self.noise)
        thoughts = self._text(branches) if case.makes_text else None
        contexts = {}
        if case.makes_image:
            if thoughts is not None:
                branches.add_thoughts([thoughts])
            contexts = {
                name: (c.length, c.rope)
                for name, [c] in (
                    ("cond", branches.cond),
                    ("text", branches.text_dropped),
                    ("image", branches.image_dropped),
                )
            }
            self._picture(branches, grid or sampler.grid(last or (0, 0)))
        if self.mode == "record":
            self.found |= {n: t for n, t in self.script.tensors.items() if n.startswith("picture")}
        return Trace(case, self.found, Facts(text=self.answer, contexts=contexts))

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """The next draw: of the seeded generator when recording, else the recorded one."""
        name = f"noise{self._draws}"
        self._draws += 1
        draw = torch.randn(shape, generator=self._generator) if self.mode == "record" else self.script.tensors[name]
        if self.mode == "record":
            self.found[name] = draw
        return draw

    def tap(self, event: str) -> Tap:
        """Keeps a few rows of each state."""
        rows = self.case.record.tap_rows

        def keep(name: str, state: Tensor) -> None:
            if name.startswith(TAPPED_PREFIXES):
                self.found[f"tap/{event}/{name}"] = state[_spread(state.shape[0], rows)].cpu()

        return keep

    # --- text ---------------------------------------------------------------------------------------------------------

    def _text(self, branches: Branches) -> str:
        """Decodes, or feeds the recorded ids. Returns the thoughts for the picture: always the reference's."""
        settings = TextSettings(max_tokens=self.case.text.max_tokens)
        logits: list[Tensor] = []
        kept = self.case.record.logits

        def keep(row: Tensor) -> None:
            if len(logits) < kept:
                logits.append(row[0].cpu())

        if self.mode == "replay":
            fork = [c.fork() for c in branches.cond]
            for token in self.script.tensors["ids"][:kept].tolist():
                keep(self.sampler.bagel.next_logits(fork, [token]))
            self.answer = self.script.facts.text
        else:
            [ids] = self.sampler.decode_text(branches.cond, settings, on_logits=keep)
            self.found["ids"] = torch.tensor(ids)
            self.answer = self.sampler.text.answer(ids)
        self.found["logits"] = torch.stack(logits)
        thoughts = self.answer if self.mode == "record" else self.script.facts.text
        return thoughts or ""

    # --- pictures -----------------------------------------------------------------------------------------------------

    def _picture(self, branches: Branches, grid: tuple[int, int]) -> None:
        x = self.noise((grid[0] * grid[1], self.sampler.bagel.config.latent_width))
        if self.mode == "replay":
            self._replay_steps(branches, grid)
            latent = self.script.tensors["latent"].to(self.sampler.bagel.device)
        else:
            latent = self._denoise(branches, x, grid)
        self.found["latent"] = latent.cpu()
        self.found["image"] = image_tensor(self.sampler.picture(latent, grid))

    def _denoise(self, branches: Branches, x: Tensor, grid: tuple[int, int]) -> Tensor:
        flow = FlowSettings(**self.case.flow.model_dump())
        chosen = set(_spread(flow.num_timesteps - 1, self.case.record.steps))
        for step in self.sampler.denoise(branches, x, [grid], flow):
            if step.index in chosen and self.mode == "record":
                self._keep(step)
                self._tap_step(branches, step.index, step.x, step.t, grid, chosen)
            x = step.x_next
        return x

    def _replay_steps(self, branches: Branches, grid: tuple[int, int]) -> None:
        flow, recorded = FlowSettings(**self.case.flow.model_dump()), self.script.tensors
        for index in self.script.steps:
            x, t = recorded[f"step{index}/x"].to(self.sampler.bagel.device), recorded[f"step{index}/t"]
            use_text, use_image = f"step{index}/v_text" in recorded, f"step{index}/v_image" in recorded
            v, v_text, v_image = self.sampler.velocities(branches, x, t, [grid], use_text, use_image)
            guided = v if v_text is None else guide(v, v_text, v_image, flow)
            self._keep(Step(index, t, x, v, v_text, v_image, guided, x))
            self._tap_step(branches, index, x, t, grid, self.script.steps)

    def _keep(self, step: Step) -> None:
        for name in ("x", "t", "v_cond", "v_text", "v_image", "v"):
            tensor = getattr(step, name)
            if tensor is not None:
                self.found[f"step{step.index}/{name}"] = tensor.cpu()

    def _tap_step(
        self,
        branches: Branches,
        index: int,
        x: Tensor,
        t: Tensor,
        grid: tuple[int, int],
        steps: Sequence[int] | set[int],
    ) -> None:
        """A second, tapped pass at the first and at the middle recorded step (tapping changes the order of rows)."""
        ordered = sorted(steps)
        if self.tapping and index in (ordered[0], ordered[len(ordered) // 2]):
            self.sampler.velocities(branches, x, t, [grid], False, False, self.tap(f"step{index}"))


class _Watched(Branches):
    """Branches that tap every event of the conditional context, and follow the script's VAE latents."""

    def __init__(self, sampler: Sampler, observer: _Observer) -> None:
        super().__init__(sampler)
        self._observer = observer
        self._events = 0
        self._latents = 0

    def _tap(self, contexts: list[Context], kind: str) -> tuple[list[Context], Tap] | None:
        """Forks and a tap for a second pass, or None where nothing is watched."""
        if contexts is not self.cond or not self._observer.tapping:
            return None
        self._events += 1
        return [c.fork() for c in contexts], self._observer.tap(f"{self._events:02d}_{kind}")

    def prefill_text(self, contexts: list[Context], texts: Sequence[str]) -> None:
        if watched := self._tap(contexts, "text"):
            ids = [self._sampler.text.turn(t) for t in texts]
            self._sampler.bagel.prefill_text(watched[0], ids, watched[1])
        super().prefill_text(contexts, texts)

    def prefill_vit(self, contexts: list[Context], images: list[Tensor]) -> None:
        if watched := self._tap(contexts, "vit"):
            self._sampler.bagel.prefill_vit(watched[0], images, self._sampler.wrap, watched[1])
        super().prefill_vit(contexts, images)

    def prefill_latent(self, contexts: list[Context], latents: list[Tensor]) -> None:
        name = f"vae_latent{self._latents}"
        self._latents += 1
        self._observer.found[name] = latents[0].cpu()
        if self._observer.mode == "replay":
            latents = [self._observer.script.tensors[name].to(latents[0].device)]
        if watched := self._tap(contexts, "vae"):
            self._sampler.bagel.prefill_latent(watched[0], latents, self._sampler.wrap, watched[1])
        super().prefill_latent(contexts, latents)


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the indices 0 .. count-1, evenly, first and last among them."""
    if wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [0]
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def _opened(path: Path, case: Case) -> Image.Image:
    try:
        return to_rgb(Image.open(path))
    except OSError as error:
        raise InputError(f"case {case.name}: picture {path} cannot be read ({error}).") from None
