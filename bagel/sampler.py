"""The reference sampler: turns of text and pictures in, text or a picture out.

    sampler = Sampler.from_dir(folder)
    sampler.run(["a red cat"], size=(1024, 1024), seed=1).image            text to image
    sampler.run([picture, "make it night"], flow=EDIT_FLOW, seed=1).image  editing
    sampler.run([picture, "what is this?"], output="text").text            understanding
    think=True lets the model plan in words first, in all of them.

The loops are plain: `denoise` yields one Step per network evaluation and `decode_text` calls back per token, so that
whoever wants to watch, record or replay does not need another sampler. Randomness comes from an explicit CPU generator
or from given tensors. Branches of guidance that would repeat another one's work are not evaluated (`plain` turns that off).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from bagel.context import Context
from bagel.errors import BagelError
from bagel.flow import FlowSettings, euler, guide, guided, schedule
from bagel.inputs import THINK_IMAGE, THINK_TEXT, TextCodec, resized, to_rgb, to_tensor
from bagel.loading import load_bagel, load_vae
from bagel.model import Bagel, Tap
from bagel.vae import AutoEncoder, to_uint8

Turn = str | Image.Image
Noise = Callable[[tuple[int, ...]], Tensor]  # shape -> standard normal, fp32, CPU

EDIT_FLOW = FlowSettings(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel")


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How text is decoded. `max_tokens` counts the start token, which is fed but never shown."""

    max_tokens: int = 1000
    do_sample: bool = False
    temperature: float = 0.3

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise BagelError(f"max_tokens is {self.max_tokens}, expected at least 1.")
        if self.do_sample and self.temperature <= 0:
            raise BagelError(f"temperature is {self.temperature}, expected more than 0 when sampling.")


@dataclass(frozen=True, slots=True)
class Step:
    """One network evaluation: x (fp32) entering it at time t, and the velocities of the branches that ran."""

    index: int
    t: Tensor
    x: Tensor
    v_cond: Tensor
    v_text: Tensor | None
    v_image: Tensor | None
    v: Tensor
    x_next: Tensor


@dataclass(slots=True)
class Result:
    """What a run gave. `text` is the answer or the thoughts; `ids` as decoded, start token first."""

    text: str | None = None
    ids: list[int] = field(default_factory=list)
    image: Image.Image | None = None
    latent: Tensor | None = None


class Branches:
    """The contexts of the three guidance branches for B samples, kept by the official rules.

    text-dropped: cond as it was before the last text turn, or just after the last image.
    image-dropped: every text turn and the system prompt, no image, no thoughts.
    While a branch equals cond it is not filled a second time, unless `plain`.
    """

    def __init__(self, sampler: Sampler, batch: int = 1, plain: bool = False) -> None:
        self._sampler = sampler
        self.cond = [sampler.bagel.new_context() for _ in range(batch)]
        self.text_dropped = _fork(self.cond)
        self._image_dropped = _fork(self.cond) if plain else None

    @property
    def image_dropped(self) -> list[Context]:
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
        self.text_dropped = _fork(self.cond)
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
        self.prefill_vit(self.cond, [to_tensor(resized(i, rule)) for i in images])
        self.text_dropped = _fork(self.cond)

    def _text(self, texts: Sequence[str]) -> None:
        self.prefill_text(self.cond, texts)
        if self._image_dropped is not None:
            self.prefill_text(self._image_dropped, texts)

    def _split_off_image_dropped(self) -> None:
        if self._image_dropped is None:
            self._image_dropped = _fork(self.cond)

    # The three events; a recorder overrides them.

    def prefill_text(self, contexts: list[Context], texts: Sequence[str]) -> None:
        self._sampler.bagel.prefill_text(contexts, [self._sampler.text.turn(t) for t in texts])

    def prefill_latent(self, contexts: list[Context], latents: list[Tensor]) -> None:
        self._sampler.bagel.prefill_latent(contexts, latents, self._sampler.wrap)

    def prefill_vit(self, contexts: list[Context], images: list[Tensor]) -> None:
        self._sampler.bagel.prefill_vit(contexts, images, self._sampler.wrap)


def _fork(contexts: Sequence[Context]) -> list[Context]:
    return [c.fork() for c in contexts]


class Sampler:
    """A model with its VAE and tokenizer."""

    def __init__(self, bagel: Bagel, vae: AutoEncoder, text: TextCodec) -> None:
        self.bagel, self.vae, self.text = bagel, vae, text
        self.merge_branches = False  # evaluate the branches of a step in one packed pass (weights are read once)

    @classmethod
    def from_dir(
        cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> Sampler:
        """Loads a full-precision checkpoint folder in the official layout. Raises BagelError on anything missing."""
        folder, device = Path(folder), torch.device(device)
        return cls(load_bagel(folder, device, dtype), load_vae(folder, device), TextCodec.from_dir(folder))

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
        """Text and pictures in order -> text, or a picture of `size` (H, W; the last input picture's size if there is one).

        `noise` replaces the draws of the seeded CPU generator: first one per input picture, then the initial x.
        """
        flow, text = flow or FlowSettings(), text or TextSettings()
        generator = torch.Generator().manual_seed(seed)
        noise = noise or (lambda shape: torch.randn(shape, generator=generator))
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

    def chat(self, images: Sequence[Image.Image], prompt: str, text: TextSettings | None = None, seed: int = 0) -> Result:
        """The evaluation path: pictures straight through the ViT's resize rule, then the prompt, then decoding."""
        contexts = [self.bagel.new_context()]
        for image in images:
            pixels = to_tensor(resized(to_rgb(image), self.bagel.config.vit_rule))
            self.bagel.prefill_vit(contexts, [pixels], self.wrap)
        self.bagel.prefill_text(contexts, [self.text.turn(prompt)])
        [ids] = self.decode_text(contexts, text or TextSettings(), torch.Generator().manual_seed(seed))
        return Result(text=self.text.answer(ids), ids=ids)

    # --- text ---------------------------------------------------------------------------------------------------------

    def decode_text(
        self,
        contexts: Sequence[Context],
        settings: TextSettings,
        generator: torch.Generator | None = None,
        on_token: Callable[[int], None] | None = None,
        on_logits: Callable[[Tensor], None] | None = None,
    ) -> list[list[int]]:
        """Continues each context (which stays as it is); ids start with the start token and never hold the end token.

        Each sample stops at its own end token. `on_token` sees the first sample's ids, `on_logits` every [B, V].
        """
        live = list(range(len(contexts)))
        forks = _fork(contexts)
        ids: list[list[int]] = [[] for _ in contexts]
        current = [self.text.bos] * len(contexts)
        for _ in range(settings.max_tokens):
            for sample, token in zip(live, current, strict=True):
                ids[sample].append(token)
                if on_token and sample == 0 and len(ids[0]) > 1:
                    on_token(token)
            logits = self.bagel.next_logits([forks[s] for s in live], current)
            if on_logits:
                on_logits(logits)
            chosen = _choose(logits, settings, generator)
            going = [i for i, token in enumerate(chosen) if token != self.text.eos]
            live, current = [live[i] for i in going], [chosen[i] for i in going]
            if not live:
                break
        return ids

    # --- images -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def denoise(
        self,
        branches: Branches,
        x: Tensor,
        grids: Sequence[tuple[int, int]],
        flow: FlowSettings,
        tap: Tap | None = None,
        plain: bool = False,
    ) -> Iterator[Step]:
        """Yields num_timesteps - 1 steps. x: packed noise [N, p*p*z] of all samples; grids: (rows, cols) of each.

        `plain` evaluates every branch the official code does; `tap` sees the first conditional pass.
        """
        times = schedule(flow.num_timesteps, flow.timestep_shift)
        x = x.to(self.bagel.device, torch.float32)
        for index, (t, dt) in enumerate(zip(times[:-1], times[:-1] - times[1:], strict=True)):
            on = guided(t, flow)
            use_text = on and flow.cfg_text_scale > 1
            use_image = on and flow.cfg_img_scale > 1 and (use_text or plain)
            v, v_text, v_image = self.velocities(
                branches, x, t, grids, use_text, use_image, tap if index == 0 else None, plain
            )
            v_step = v if not use_text else guide(v, v if v_text is None else v_text, v_image, flow)
            x_next = euler(x, v_step, dt)
            yield Step(index, t, x, v, v_text, v_image, v_step, x_next)
            x = x_next

    def velocities(
        self,
        branches: Branches,
        x: Tensor,
        t: Tensor,
        grids: Sequence[tuple[int, int]],
        use_text: bool,
        use_image: bool,
        tap: Tap | None = None,
        plain: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
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
                raise BagelError(f"image {name} is {pixels}, expected at most {side * stride} (the latent table's size).")
        return size[0] // stride, size[1] // stride

    @torch.no_grad()
    def encode(self, image: Image.Image, noise: Noise) -> Tensor:
        """Picture -> VAE latent [z, h, w], resized by the VAE rule once more (the official code does) and sampled."""
        pixels_CHW = to_tensor(resized(image, self.bagel.config.vae_rule))
        factor, z = self.bagel.config.vae_downsample, self.bagel.config.latent_channels
        draw = noise((1, z, pixels_CHW.shape[1] // factor, pixels_CHW.shape[2] // factor))
        device = next(self.vae.parameters()).device
        return self.vae.encode(pixels_CHW[None].to(device), draw.to(device, torch.float32))[0]

    @torch.no_grad()
    def picture(self, packed: Tensor, grid: tuple[int, int]) -> Image.Image:
        """Packed latent -> picture."""
        latent = self.bagel.unpack_latent(packed, *grid)[None]
        device = next(self.vae.parameters()).device
        pixels_CHW = to_uint8(self.vae.decode(latent.to(device, torch.float32)))[0]
        return Image.fromarray(pixels_CHW.permute(1, 2, 0).cpu().numpy())


def _choose(logits_BV: Tensor, settings: TextSettings, generator: torch.Generator | None) -> list[int]:
    """Greedy (ties to the lowest id) or one draw from softmax(logits / temperature); no top-k, no top-p."""
    if not settings.do_sample:
        return logits_BV.argmax(dim=-1).tolist()
    probabilities = torch.softmax(logits_BV.float().cpu() / settings.temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].tolist()
