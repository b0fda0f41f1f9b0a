"""From examples to packed batches: pictures are resized, conditions dropped, latents encoded, samples laid out.

Everything random about a sample (which conditions are dropped, the time of a noised picture, the noise) is drawn from
its own key, so that a batch is the same whoever makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagel.config import ResizeRule
from bagel.images import resized
from bagel.inputs import to_tensor
from bagel.sampler import Sampler
from bagel.training import DroppedImage, Item, LatentItem, PackedBatch, TextItem, ViTItem, pack
from bagel_compress.errors import FinetuneError
from bagel_compress.finetune.config import DataGroup, FinetuneConfig
from bagel_compress.finetune.example import Example, PicturePart, RowError, TextPart
from bagel_compress.finetune.stream import Damage, Drawn, ExampleStream

WRAPPERS = 2  # tokens around a picture


@dataclass(frozen=True, slots=True)
class Encodable:
    """A picture on its way to a LatentItem: pixels [3, H, W] in [-1, 1], time before the sigmoid (None: clean)."""

    pixels: Tensor
    timestep: float | None
    seed: int  # of the posterior's noise


Planned = TextItem | ViTItem | DroppedImage | Encodable


@dataclass(frozen=True, slots=True)
class Prepared:
    """A packed batch, its flow noise [N, p*p*z], and how many tokens and samples it has."""

    batch: PackedBatch
    noise: Tensor
    samples: int

    @property
    def tokens(self) -> int:
        return sum(self.batch.sample_lens)

    def inputs(self, device: torch.device) -> tuple[Any, ...]:
        """What the network is called with."""
        return self.batch.to(device), self.noise.to(device)


class Packer:
    """Packs a stream for a model. `sampler` gives configuration, tokenizer and VAE."""

    def __init__(
        self, sampler: Sampler, config: FinetuneConfig, stream: ExampleStream, damage: Sequence[Damage]
    ) -> None:
        self.sampler, self.config, self.stream = sampler, config, stream
        self._groups, self._damage = config.data, damage
        self._rules = [group.rules(sampler.bagel.config) for group in config.data]
        self._state = stream.state()  # before the sample that did not fit into the last batch

    def next(self) -> Prepared:
        """The next batch of at most `config.tokens` tokens. Raises FinetuneError on too much damaged data."""
        self.stream.load(self._state)
        taken: list[tuple[list[Planned], tuple[int, ...]]] = []
        total = 0
        while True:
            self._state = self.stream.state()
            drawn = self.stream.draw()
            try:
                items = self._planned(drawn)
            except RowError as fault:
                self._damage[drawn.group].add(drawn.row, str(fault))
                continue
            length = sum(self._length(item) for item in items)
            if length > self.config.tokens:
                why = f"it is {length} tokens long, a packed batch holds {self.config.tokens} (tokens)"
                self._damage[drawn.group].add(drawn.row, why)
                continue
            if total + length > self.config.tokens:
                return self._packed(taken)
            taken.append((items, drawn.key))
            total += length

    def state(self) -> dict[str, Any]:
        """Where the stream is at the end of the last batch."""
        return self._state

    def load(self, state: dict[str, Any]) -> None:
        self._state = state

    def _planned(self, drawn: Drawn) -> list[Planned]:
        group, rules = self._groups[drawn.group], self._rules[drawn.group]
        items = plan(drawn.example, group, rules, np.random.default_rng((*drawn.key, 1)), self.config)
        if not any(isinstance(i, Encodable) and i.timestep is not None for i in items) and not any(
            isinstance(i, TextItem) and i.loss for i in items
        ):
            raise RowError("nothing of it is learnt with visual_und and visual_gen as they are")
        side = self.sampler.bagel.config.max_latent_size * self.sampler.bagel.config.image_stride
        for item in items:
            if isinstance(item, Encodable) and max(item.pixels.shape[1:]) > side:
                raise FinetuneError(
                    f"data group {group.name}: pictures become {item.pixels.shape[2]} x {item.pixels.shape[1]}, the"
                    f" model draws up to {side} a side; lower image: max_size."
                )
        return items

    def _length(self, item: Planned) -> int:
        config = self.sampler.bagel.config
        if isinstance(item, TextItem):
            return len(self.sampler.text.turn(item.text))
        if isinstance(item, DroppedImage):
            return 0
        pixels, cell = (
            (item.image, config.vit.patch_size) if isinstance(item, ViTItem) else (item.pixels, config.image_stride)
        )
        return WRAPPERS + (pixels.shape[1] // cell) * (pixels.shape[2] // cell)

    def _packed(self, taken: list[tuple[list[Planned], tuple[int, ...]]]) -> Prepared:
        samples = [[self._item(item) for item in items] for items, _ in taken]
        batch = pack(self.sampler.bagel, self.sampler.text, samples)
        generator = torch.Generator().manual_seed(_seed(np.random.default_rng((*taken[0][1], 2))))
        return Prepared(batch, torch.randn(batch.latents.shape, generator=generator), len(samples))

    @torch.no_grad()
    def _item(self, item: Planned) -> Item:
        if not isinstance(item, Encodable):
            return item
        vae, z = self.sampler.vae, self.sampler.bagel.config.latent_channels
        where = next(vae.parameters()).device
        factor = self.sampler.bagel.config.vae_downsample
        shape = (1, z, item.pixels.shape[1] // factor, item.pixels.shape[2] // factor)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(item.seed))
        return LatentItem(vae.encode(item.pixels[None].to(where), noise.to(where))[0].cpu(), item.timestep)


def plan(
    example: Example,
    group: DataGroup,
    rules: tuple[ResizeRule, ResizeRule],
    rng: np.random.Generator,
    config: FinetuneConfig,
) -> list[Planned]:
    """The items of an example. A dropped text leaves nothing, a dropped picture its rope position.

    With `visual_gen` false there are no latents, with `visual_und` false no ViT pictures and no learnt answers.
    """
    items: list[Planned] = []
    for part in example:
        if isinstance(part, TextPart):
            if part.learnt:
                items += [TextItem(part.text, loss=True)] if config.visual_und else []
            elif rng.random() >= group.drop_text:
                items.append(TextItem(part.text))
            continue
        items += _forms(part, group, rules, rng, config)
    return items


def _forms(
    part: PicturePart,
    group: DataGroup,
    rules: tuple[ResizeRule, ResizeRule],
    rng: np.random.Generator,
    config: FinetuneConfig,
) -> list[Planned]:
    items: list[Planned] = []
    latent = part.drawn or part.clean
    pixels = to_tensor(resized(part.image, rules[0])) if latent and config.visual_gen else None
    if part.drawn and pixels is not None:
        items.append(Encodable(pixels, float(rng.normal()), _seed(rng)))
    if part.clean and pixels is not None:
        dropped = part.droppable and rng.random() < group.drop_vae
        items.append(DroppedImage() if dropped else Encodable(pixels, None, _seed(rng)))
    if part.seen and config.visual_und:
        if part.droppable and rng.random() < group.drop_vit:
            items.append(DroppedImage())
        else:
            items.append(ViTItem(to_tensor(resized(part.image, rules[1]))))
    return items


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 62))
