"""The sampler's loops, for any backend that can make the model's passes: turns to contexts, text loop, denoising loop.

Nothing here knows what an array is: `bagel.sampler.Sampler` runs these loops on torch, and an exported model runs them
on another runtime. A backend gives the passes (`bagel`), the tokenizer (`text`) and the methods at the end of `Loops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from bagel.errors import BagelError
from bagel.finite import check_finite
from bagel.images import resized, to_rgb
from bagel.settings import FlowSettings, TextSettings, check_seed
from bagel.text import THINK_IMAGE, THINK_TEXT, TextCodec

Array = Any  # torch.Tensor or numpy.ndarray, as the backend has it
Turn = str | Image.Image
Noise = Callable[[tuple[int, ...]], Array]  # shape -> standard normal, fp32, CPU
Tap = Callable[[str, Array], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One network evaluation: x (fp32) entering it at time t, and the velocities of the branches that ran."""

    index: int
    t: Array
    x: Array
    v_cond: Array
    v_text: Array | None
    v_image: Array | None
    v: Array
    x_next: Array


@dataclass(slots=True)
class Result:
    """What a run gave. `text` is the answer or the thoughts; `ids` as decoded, start token first."""

    text: str | None = None
    ids: list[int] = field(default_factory=list)
    image: Image.Image | None = None
    latent: Array | None = None


class Branches:
    """The contexts of the three guidance branches for B samples, kept by the official rules.

    text-dropped: cond as it was before the last text turn, or just after the last image.
    image-dropped: every text turn and the system prompt, no image, no thoughts.
    While a branch equals cond it is not filled a second time, unless `plain`.
    """

    def __init__(self, sampler: Any, batch: int = 1, plain: bool = False) -> None:
        self._sampler = sampler
        self.cond = [sampler.bagel.new_context() for _ in range(batch)]
        self.text_dropped = forks(self.cond)
        self._image_dropped = forks(self.cond) if plain else None

    @property
    def image_dropped(self) -> list[Any]:
        return self.cond if self._image_dropped is None else self._image_dropped

    @property
    def image_equals_cond(self) -> bool:
        return self._image_dropped is None

    @property
    def text_equals_cond(self) -> bool:
        return all(a.length == b.length for a, b in zip(self.text_dropped, self.cond, strict=True))

    def add_system(self, prompt: str) -> None:
        """A system prompt: a text turn that does not move the text-dropped branch."""
        self._text([prompt] * len(self.cond))

    def add_text(self, texts: Sequence[str]) -> None:
        """One text turn per sample."""
        self.text_dropped = forks(self.cond)
        self._text(texts)

    def add_thoughts(self, texts: Sequence[str]) -> None:
        """Decoded thoughts: re-tokenised, appended to cond alone."""
        self._split_off_image_dropped()
        self.prefill_text(self.cond, texts)

    def add_image(self, images: Sequence[Image.Image], noise: Noise | None) -> None:
        """One picture per sample (RGB, already resized by the VAE rule); without `noise`, as ViT features only."""
        self._split_off_image_dropped()
        if noise is not None:
            self.prefill_latent(self.cond, [self._sampler.encode(i, noise) for i in images])
        rule = self._sampler.bagel.config.vit_rule
        self.prefill_vit(self.cond, [self._sampler.pixels(resized(i, rule)) for i in images])
        self.text_dropped = forks(self.cond)

    def _text(self, texts: Sequence[str]) -> None:
        self.prefill_text(self.cond, texts)
        if self._image_dropped is not None:
            self.prefill_text(self._image_dropped, texts)

    def _split_off_image_dropped(self) -> None:
        if self._image_dropped is None:
            self._image_dropped = forks(self.cond)

    # The three events; a recorder overrides them.

    def prefill_text(self, contexts: list[Any], texts: Sequence[str]) -> None:
        self._sampler.bagel.prefill_text(contexts, [self._sampler.text.turn(t) for t in texts])

    def prefill_latent(self, contexts: list[Any], latents: list[Array]) -> None:
        self._sampler.bagel.prefill_latent(contexts, latents, self._sampler.wrap)

    def prefill_vit(self, contexts: list[Any], images: list[Array]) -> None:
        self._sampler.bagel.prefill_vit(contexts, images, self._sampler.wrap)


def forks(contexts: Sequence[Any]) -> list[Any]:
    """Independent copies of contexts; they share storage."""
    return [c.fork() for c in contexts]


class Loops(ABC):
    """The sampler without its arithmetic."""

    bagel: Any
    text: TextCodec
    merge_branches: bool  # evaluate the branches of a step in one packed pass (weights are read once)

    @property
    def wrap(self) -> tuple[int, int]:
        return self.text.image_start, self.text.image_end

    def run(
        self,
        turns: Sequence[Turn],
        *,
        output: Literal["image", "text"] = "image",
        think: bool = False,
        size: tuple[int, int] | None = None,
        flow: FlowSettings | None = None,
        text: TextSettings | None = None,
        seed: int = 0,
        noise: Noise | None = None,
        on_step: Callable[[Step], None] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Result:
        """Text and pictures in order -> text, or a picture of `size` (H, W; the last input picture's if there is one).

        `noise` replaces the draws of the seeded CPU generator: first one per input picture, then the initial x.
        """
        flow, text = flow or FlowSettings(), text or TextSettings()
        if output == "image" and size is not None and all(isinstance(turn, str) for turn in turns):
            self.grid(size)  # a size that cannot be is refused before any work
        generator = self.generator(check_seed(seed))
        noise = noise or (lambda shape: self.normal(shape, generator))
        branches = Branches(self)
        last = self.read(branches, turns, output, think, noise)
        if output == "text":
            [ids] = self.decode_text(branches.cond, text, generator, on_token)
            return Result(text=self.text.answer(ids), ids=ids)
        result = Result()
        if think:
            [result.ids] = self.decode_text(branches.cond, text, generator, on_token)
            result.text = self.text.answer(result.ids)
            branches.add_thoughts([result.text])
        grid = self.grid(last or size or (1024, 1024))
        x = noise((grid[0] * grid[1], self.bagel.config.latent_width))
        for step in self.denoise(branches, x, [grid], flow):
            x = step.x_next
            if on_step:
                on_step(step)
        result.latent, result.image = x, self.picture(x, grid)
        return result

    def read(
        self, branches: Branches, turns: Sequence[Turn], output: str, think: bool, noise: Noise
    ) -> tuple[int, int] | None:
        """Puts the turns into the contexts. Returns (H, W) of the last picture, which decides the output size."""
        if think:
            branches.add_system(THINK_IMAGE if output == "image" else THINK_TEXT)
        last = None
        for turn in turns:
            if isinstance(turn, str):
                branches.add_text([turn])
            else:
                image = resized(to_rgb(turn), self.bagel.config.vae_rule)
                branches.add_image([image], noise if output == "image" else None)
                last = (image.height, image.width)
        return last

    def chat(
        self, images: Sequence[Image.Image], prompt: str, text: TextSettings | None = None, seed: int = 0
    ) -> Result:
        """The evaluation path: pictures straight through the ViT's resize rule, then the prompt, then decoding."""
        contexts = [self.bagel.new_context()]
        for image in images:
            pixels = self.pixels(resized(to_rgb(image), self.bagel.config.vit_rule))
            self.bagel.prefill_vit(contexts, [pixels], self.wrap)
        self.bagel.prefill_text(contexts, [self.text.turn(prompt)])
        [ids] = self.decode_text(contexts, text or TextSettings(), self.generator(check_seed(seed)))
        return Result(text=self.text.answer(ids), ids=ids)

    def decode_text(
        self,
        contexts: Sequence[Any],
        settings: TextSettings,
        generator: Any = None,
        on_token: Callable[[int], None] | None = None,
        on_logits: Callable[[Array], None] | None = None,
    ) -> list[list[int]]:
        """Continues each context (which stays as it is); ids start with the start token and never hold the end token.

        Each sample stops at its own end token. `on_token` sees the first sample's ids, `on_logits` every [B, V].
        """
        live = list(range(len(contexts)))
        copies = forks(contexts)
        ids: list[list[int]] = [[] for _ in contexts]
        current = [self.text.bos] * len(contexts)
        for _ in range(settings.max_tokens):
            for sample, token in zip(live, current, strict=True):
                ids[sample].append(token)
                if on_token and sample == 0 and len(ids[0]) > 1:
                    on_token(token)
            logits = self.bagel.next_logits([copies[s] for s in live], current)
            check_finite("the logits of the next token", logits)
            if on_logits:
                on_logits(logits)
            chosen = self.choose(logits, settings, generator)
            going = [i for i, token in enumerate(chosen) if token != self.text.eos]
            live, current = [live[i] for i in going], [chosen[i] for i in going]
            if not live:
                break
        return ids

    def denoise(
        self,
        branches: Branches,
        x: Array,
        grids: Sequence[tuple[int, int]],
        flow: FlowSettings,
        tap: Tap | None = None,
        plain: bool = False,
    ) -> Iterator[Step]:
        """Yields num_timesteps - 1 steps. x: packed noise [N, p*p*z] of all samples; grids: (rows, cols) of each.

        `plain` evaluates every branch the official code does; `tap` sees the first conditional pass.
        """
        times = self.schedule(flow)
        x = self.start(x)
        for index in range(len(times) - 1):
            step = self.step(branches, x, times, index, grids, flow, tap if index == 0 else None, plain)
            check_finite(f"the values of the picture after step {index + 1} of {len(times) - 1}", step.x_next)
            yield step
            x = step.x_next

    def step(
        self,
        branches: Branches,
        x: Array,
        times: Array,
        index: int,
        grids: Sequence[tuple[int, int]],
        flow: FlowSettings,
        tap: Tap | None = None,
        plain: bool = False,
    ) -> Step:
        """One step from x (as `start` gives it) at times[index]; also what a teacher-forced replay calls."""
        t, dt = times[index], times[index] - times[index + 1]
        use_text = flow.guides(t) and flow.cfg_text_scale > 1
        use_image = flow.guides(t) and flow.cfg_img_scale > 1 and (use_text or plain)
        v, v_text, v_image = self.velocities(branches, x, t, grids, use_text, use_image, tap, plain)
        v_step = v if v_text is None else self.guide(v, v_text, v_image, flow)
        return Step(index, t, x, v, v_text, v_image, v_step, self.euler(x, v_step, dt))

    def velocities(
        self,
        branches: Branches,
        x: Array,
        t: Array,
        grids: Sequence[tuple[int, int]],
        use_text: bool,
        use_image: bool,
        tap: Tap | None = None,
        plain: bool = False,
    ) -> tuple[Array, Array | None, Array | None]:
        """Velocities of the branches at (x, t): cond, text-dropped or None, image-dropped or None.

        A branch whose context equals cond gives cond's velocity without being evaluated.
        """
        block = self.bagel.noisy_block(x, t, grids, self.wrap, tap)
        skip_text = branches.text_equals_cond and not plain
        skip_image = branches.image_equals_cond and not plain
        contexts = [branches.cond]
        if use_text and not skip_text:
            contexts.append(branches.text_dropped)
        if use_image and not skip_image:
            contexts.append(branches.image_dropped)
        if self.merge_branches and len(contexts) > 1 and not tap:
            merged = block.repeated(len(contexts))
            found = list(self.bagel.velocity(merged, [c for part in contexts for c in part]).chunk(len(contexts)))
        else:
            found = [self.bagel.velocity(block, c, tap if i == 0 else None) for i, c in enumerate(contexts)]
        v = found.pop(0)
        v_text = None if not use_text else v if skip_text else found.pop(0)
        v_image = None if not use_image else v if skip_image else found.pop(0)
        return v, v_text, v_image

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, cols) of latent tokens of an image of (H, W) pixels. Raises BagelError on a size that cannot be."""
        stride, side = self.bagel.config.image_stride, self.bagel.config.max_latent_size
        for name, pixels in zip(("height", "width"), size, strict=True):
            if pixels <= 0 or pixels % stride:
                raise BagelError(f"image {name} is {pixels}, expected a positive multiple of {stride}.")
            if pixels > side * stride:
                raise BagelError(
                    f"image {name} is {pixels}, expected at most {side * stride} (the latent table's size)."
                )
        return size[0] // stride, size[1] // stride

    # --- what a backend gives -----------------------------------------------------------------------------------------

    @abstractmethod
    def generator(self, seed: int) -> Any:
        """A seeded source of randomness."""

    @abstractmethod
    def normal(self, shape: tuple[int, ...], generator: Any) -> Array:
        """Standard normal values, fp32, CPU."""

    @abstractmethod
    def choose(self, logits_BV: Array, settings: TextSettings, generator: Any) -> list[int]:
        """Greedy (ties to the lowest id) or one draw from softmax(logits / temperature); no top-k, no top-p."""

    @abstractmethod
    def schedule(self, flow: FlowSettings) -> Array:
        """Times from 1 down to 0, fp32."""

    @abstractmethod
    def start(self, x: Array) -> Array:
        """The initial noise as fp32 where the loop keeps x."""

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
