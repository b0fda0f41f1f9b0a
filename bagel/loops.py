"""The sampler's script, for any backend that can make the model's passes: turns -> contexts -> text, picture.

    read          the turns of every sample become contexts (bagel/branches.py)
    decode_text   token by token
    denoise       step by step, each of them guided

`run` and `run_batch` call these three in order, and tell a listener (bagel/events.py) what they do. Nothing here knows
what an array is: `bagel.sampler.Sampler` runs the script on torch, and an exported model runs it on another runtime. A
backend gives the passes (`bagel`), the tokenizer (`text`) and the methods at the end of `Loops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from PIL import Image

from bagel.branches import Branches, Noise, forks
from bagel.errors import BagelError
from bagel.events import Array, Drawing, Listener, Step, StepInput
from bagel.finite import check_finite
from bagel.images import resized, to_rgb
from bagel.settings import FlowSettings, TextSettings, check_seed
from bagel.solvers import Past
from bagel.step_cache import StepCache, Velocities
from bagel.text import THINK_IMAGE, THINK_TEXT, TextCodec

Turn = str | Image.Image
Output = Literal["image", "text"]
DEFAULT_SIZE = (1024, 1024)  # (H, W) of the official sampler


@dataclass(frozen=True, slots=True)
class Request:
    """One sample of a batch. `size` (H, W) counts where no input picture decides it."""

    turns: Sequence[Turn]
    size: tuple[int, int] | None = None
    seed: int = 0


@dataclass(slots=True)
class Result:
    """The result of a run. `text` is the answer or the thoughts; `ids` as decoded, start token first."""

    text: str | None = None
    ids: list[int] = field(default_factory=list)
    image: Image.Image | None = None
    latent: Array | None = None


class Loops(ABC):
    """The sampler's control flow; a backend supplies the arithmetic."""

    bagel: Any
    text: TextCodec
    merge_branches = False  # evaluate the branches of a step in one packed pass (weights are read once)
    share_branches = True  # a branch whose context equals another's is not filled and evaluated again

    @property
    def wrap(self) -> tuple[int, int]:
        """Ids of the tokens around a picture."""
        return self.text.image_start, self.text.image_end

    def run(
        self,
        turns: Sequence[Turn],
        *,
        output: Output = "image",
        think: bool = False,
        size: tuple[int, int] | None = None,
        flow: FlowSettings | None = None,
        text: TextSettings | None = None,
        seed: int = 0,
        noise: Noise | None = None,
        listener: Listener | None = None,
    ) -> Result:
        """Text and pictures in order -> text, or a picture of `size` (H, W; the last input picture's if there is one).

        `noise` replaces the draws of the seeded CPU generator: first one per input picture, then the initial x.
        Raises BagelError on a size that cannot be, and whatever `listener` raises.
        """
        requests = [Request(turns, size, seed)]
        [result] = self.run_batch(
            requests, output=output, think=think, flow=flow, text=text, noise=noise, listener=listener
        )
        return result

    def run_batch(
        self,
        requests: Sequence[Request],
        *,
        output: Output = "image",
        think: bool = False,
        flow: FlowSettings | None = None,
        text: TextSettings | None = None,
        noise: Noise | None = None,
        listener: Listener | None = None,
    ) -> list[Result]:
        """What `run` gives for each request, up to rounding, with every pass made once for all of them.

        All requests have texts and pictures in the same places; each draws from a generator of its own seed. The norm
        of `cfg_renorm_type` "global" is the whole batch's, as in the official code, so there samples are not alone.
        """
        flow, text, listener = flow or FlowSettings(), text or TextSettings(), listener or Listener()
        self._check(requests, output)
        with self.running():
            return self._run(requests, output, think, flow, text, noise, listener)

    def _run(
        self,
        requests: Sequence[Request],
        output: Output,
        think: bool,
        flow: FlowSettings,
        text: TextSettings,
        noise: Noise | None,
        listener: Listener,
    ) -> list[Result]:
        generators = [self.generator(check_seed(request.seed)) for request in requests]
        noises = [noise or partial(self.normal, generator=generator) for generator in generators]
        branches = Branches(self, len(requests), listener)
        last = self.read(branches, [request.turns for request in requests], output, think, noises)
        results = [Result() for _ in requests]
        if output == "text" or think:
            decoded = self.decode_text(branches.cond, text, generators, listener)
            results = [Result(self.text.answer(ids), ids) for ids in decoded]
        if output == "text":
            return results
        if think:
            branches.add_thoughts(listener.thoughts([result.text or "" for result in results]))
        sizes = last or [request.size or DEFAULT_SIZE for request in requests]
        drawing = Drawing(branches, [self.grid(size) for size in sizes], flow, self.schedule(flow))
        x = self.denoise(drawing, self._initial(drawing.grids, noises), listener)
        for result, latent, grid in zip(results, listener.before_picture(drawing.split(x)), drawing.grids, strict=True):
            result.latent, result.image = latent, self.picture(latent, grid)
        return results

    def _check(self, requests: Sequence[Request], output: Output) -> None:
        """Raises BagelError on an impossible request, before any work is done."""
        kinds = {tuple(isinstance(turn, str) for turn in request.turns) for request in requests}
        if len(kinds) != 1:
            raise BagelError(
                f"a batch of {len(requests)} requests has {len(kinds)} orders of texts and pictures, expected 1; run"
                " those of one order together."
            )
        for request in requests:
            if output == "image" and request.size is not None and all(isinstance(turn, str) for turn in request.turns):
                self.grid(request.size)

    def _initial(self, grids: Sequence[tuple[int, int]], noises: Sequence[Noise]) -> Array:
        """The noise that denoising begins with, [N, p*p*z]."""
        width = self.bagel.config.latent_width
        parts = [noise((rows * columns, width)) for noise, (rows, columns) in zip(noises, grids, strict=True)]
        return parts[0] if len(parts) == 1 else self.joined(parts)

    # --- the three stages ---------------------------------------------------------------------------------------------

    def read(
        self,
        branches: Branches,
        turns: Sequence[Sequence[Turn]],
        output: Output,
        think: bool = False,
        noises: Sequence[Noise] | None = None,
    ) -> list[tuple[int, int]] | None:
        """Puts the turns of every sample into the contexts. `noises` (one per sample) are for pictures into pictures.

        Returns (H, W) of each sample's last picture, which decides the size of the output, or None without pictures.
        """
        if think:
            branches.add_system(THINK_IMAGE if output == "image" else THINK_TEXT)
        last = None
        for together in zip(*turns, strict=True):
            texts = [turn for turn in together if isinstance(turn, str)]
            if texts:
                branches.add_text(texts)
                continue
            rule = self.bagel.config.vae_rule
            images = [resized(to_rgb(turn), rule) for turn in together if not isinstance(turn, str)]
            branches.add_image(images, noises if output == "image" else None)
            last = [(image.height, image.width) for image in images]
        return last

    def chat(
        self,
        images: Sequence[Image.Image],
        prompt: str,
        text: TextSettings | None = None,
        seed: int = 0,
        listener: Listener | None = None,
    ) -> Result:
        """The evaluation path: pictures straight through the ViT's resize rule, then the prompt, then decoding."""
        generator = self.generator(check_seed(seed))
        with self.running():
            branches = Branches(self, 1, listener)
            for image in images:
                branches.prefill("vit", [self.pixels(resized(to_rgb(image), self.bagel.config.vit_rule))])
            branches.prefill("text", [self.text.turn(prompt)])
            [ids] = self.decode_text(branches.cond, text or TextSettings(), [generator], listener)
        return Result(self.text.answer(ids), ids)

    def decode_text(
        self,
        contexts: Sequence[Any],
        settings: TextSettings,
        generators: Sequence[Any] | None = None,
        listener: Listener | None = None,
    ) -> list[list[int]]:
        """Continues each context (which stays as it is); ids start with the start token and never hold the end token.

        Each sample stops at its own end token. `generators`, one per sample, are for settings that draw.
        """
        listener = listener or Listener()
        draws = generators or [self.generator(0) for _ in contexts]
        live = list(range(len(contexts)))
        copies = forks(contexts)
        ids: list[list[int]] = [[] for _ in contexts]
        current = [self.text.bos] * len(contexts)
        listener.before_decode(copies)
        for _ in range(settings.max_tokens):
            for sample, token in zip(live, current, strict=True):
                ids[sample].append(token)
                if len(ids[sample]) > 1:
                    listener.token(sample, token)
            logits = self.bagel.next_logits([copies[s] for s in live], current)
            chosen = listener.logits(live, logits)
            if chosen is None:
                self.check("the logits of the next token", logits)
                chosen = self.choose(logits, settings, [draws[s] for s in live])
            going = [i for i, token in enumerate(chosen) if token != self.text.eos]
            live, current = [live[i] for i in going], [chosen[i] for i in going]
            if not live:
                break
        return ids

    def denoise(self, drawing: Drawing, x: Array, listener: Listener | None = None) -> Array:
        """From packed noise [N, p*p*z] of all samples to their packed latents, in `drawing.count` steps."""
        listener = listener or Listener()
        listener.before_denoise(drawing)
        x, past = self.start(x), Past(drawing.flow, self.start)
        for index in range(drawing.count):
            work = listener.before_step(StepInput(index, drawing.times[index], x))
            if work is None or work.x is not x:  # another path than the one that was come from
                past = Past(drawing.flow, self.start)
            if work is not None:
                x = listener.after_step(self.step(drawing, work, past)).x_next
                self.check(f"the values of the picture after step {index + 1} of {drawing.count}", x)
        return x

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, drawing: Drawing, work: StepInput, past: Past | None = None) -> Step:
        """One step from x (as `start` gives it) at time t to the next time of the schedule.

        `past`: the steps before it on the same path, which solvers and forecasts go by; None: there were none.
        """
        past = past or Past(drawing.flow, self.start)
        flow, t, t_next = drawing.flow, work.t, drawing.times[work.index + 1]
        made = self._evaluate(drawing, work, past.cache)
        passes, v_step = made.passes, made.v
        if flow.solver == "heun":
            if float(t_next) > 0 and flow.guides(t) == flow.guides(t_next):
                ahead = StepInput(work.index, t_next, self.euler(work.x, made.v, t - t_next))
                other = self._evaluate(drawing, ahead, past.cache)
                passes, v_step = passes + other.passes, (self.start(made.v) + self.start(other.v)) / 2
        elif flow.solver != "euler":
            v_step = past.solver.velocity(work.x, made.v, float(t), float(t_next), flow.guides(t))
        return replace(made, x_next=self.euler(work.x, v_step, t - t_next), passes=passes)

    def _evaluate(self, drawing: Drawing, work: StepInput, cache: StepCache) -> Step:
        """The velocities at (x, t), of the network or forecast, and the guided one. `x_next` is still x."""
        flow, t, branches = drawing.flow, work.t, drawing.branches
        use_text = flow.guides(t) and flow.cfg_text_scale > 1
        use_image = flow.guides(t) and flow.cfg_img_scale > 1 and (use_text or not self.share_branches)
        asked: list[tuple[bool, bool]] = []

        def network(text: bool, image: bool) -> Velocities:
            asked.append((text, image))
            return self.velocities(drawing, work, text, image)

        v, v_text, v_image = cache.velocities(network, work.x, float(t), use_text, use_image)
        v_guided = v if v_text is None else self.guide(v, v_text, v_image, flow)
        own_text = not (branches.text_equals_cond and self.share_branches)
        own_image = not (branches.image_equals_cond and self.share_branches)
        passes = sum(1 + (text and own_text) + (image and own_image) for text, image in asked)
        forecast = asked != [(use_text, use_image)]
        return Step(work.index, drawing.count, t, work.x, v, v_text, v_image, v_guided, work.x, passes, forecast)

    def velocities(self, drawing: Drawing, work: StepInput, use_text: bool, use_image: bool) -> Velocities:
        """Velocities of the branches at (x, t): cond, text-dropped or None, image-dropped or None.

        A branch whose context equals cond gives cond's velocity without being evaluated.
        """
        branches = drawing.branches
        skip_text = branches.text_equals_cond and self.share_branches
        skip_image = branches.image_equals_cond and self.share_branches
        contexts = [branches.cond]
        if use_text and not skip_text:
            contexts.append(branches.text_dropped)
        if use_image and not skip_image:
            contexts.append(branches.image_dropped)
        found = self.passes(drawing, work, contexts)
        v = found.pop(0)
        v_text = None if not use_text else v if skip_text else found.pop(0)
        v_image = None if not use_image else v if skip_image else found.pop(0)
        return v, v_text, v_image

    def passes(self, drawing: Drawing, work: StepInput, contexts: Sequence[Sequence[Any]]) -> list[Array]:
        """The velocity at (x, t) of each of these branches' contexts; the first one sees the tap."""
        block = self.bagel.noisy_block(work.x, work.t, drawing.grids, self.wrap, work.tap)
        if self.merge_branches and len(contexts) > 1 and not work.tap:
            merged = block.repeated(len(contexts))
            return list(self.bagel.velocity(merged, [c for part in contexts for c in part]).chunk(len(contexts)))
        return [self.bagel.velocity(block, c, work.tap if i == 0 else None) for i, c in enumerate(contexts)]

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, cols) of latent tokens of a picture of (H, W) pixels. Raises BagelError on an impossible size."""
        stride = self.bagel.config.image_stride
        self.bagel.config.check_size(size)
        return size[0] // stride, size[1] // stride

    def check(self, what: str, values: Array) -> None:
        """Raises BagelError if values are not finite."""
        check_finite(what, values)

    def running(self) -> AbstractContextManager[None]:
        """What surrounds a run; a backend may set its threads here."""
        return nullcontext()

    # --- what a backend gives -----------------------------------------------------------------------------------------

    @abstractmethod
    def generator(self, seed: int) -> Any:
        """A seeded source of randomness."""

    @abstractmethod
    def normal(self, shape: tuple[int, ...], generator: Any) -> Array:
        """Standard normal values, fp32, CPU."""

    @abstractmethod
    def choose(self, logits_BV: Array, settings: TextSettings, generators: Sequence[Any]) -> list[int]:
        """Greedy (ties to the lowest id) or one draw from softmax(logits / temperature); no top-k, no top-p.

        `generators`: one per row.
        """

    @abstractmethod
    def schedule(self, flow: FlowSettings) -> Array:
        """Times from 1 down to 0, fp32."""

    @abstractmethod
    def joined(self, parts: Sequence[Array]) -> Array:
        """Arrays one after the other along their first axis."""

    @abstractmethod
    def start(self, x: Array) -> Array:
        """The initial noise in fp32, on the device that holds x."""

    @abstractmethod
    def guide(self, v: Array, v_text: Array, v_image: Array | None, flow: FlowSettings) -> Array:
        """The guided velocity."""

    @abstractmethod
    def euler(self, x: Array, v: Array, dt: Array) -> Array:
        """One step of x."""

    @abstractmethod
    def pixels(self, image: Image.Image) -> Array:
        """RGB image -> [3, H, W] fp32 in [-1, 1]."""

    @abstractmethod
    def encode(self, image: Image.Image, noise: Noise) -> Array:
        """Picture -> VAE latent [z, h, w], resized by the VAE rule once more (the official code does) and sampled."""

    @abstractmethod
    def picture(self, packed: Array, grid: tuple[int, int]) -> Image.Image:
        """Packed latent -> picture."""
