"""Batches of the four tasks: draw a picture, answer about one, edit one, think and draw.

A step's batch depends on the seed and the step alone, so that a resumed run goes on as if it had never stopped. Scenes
for understanding are drawn fresh; pictures to be generated come from a pool whose latents were encoded once.
Conditions are dropped at random, so that guidance has something to compare with: the text, or the input picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel.images import resized
from bagel.inputs import to_tensor
from bagel.nano import language
from bagel.nano.language import Edit, ThinkTask
from bagel.nano.scenes import Scene, render, sample_scene
from bagel.text import THINK_IMAGE, TextCodec
from bagel.vae import AutoEncoder
from bagel.vit import patchify
from bagel_compress.nano_training.forward import Branch, Item, Latent, TextTurn, ViTPatches
from bagel_compress.nano_training.model import CONFIG
from bagel_compress.nano_training.vae_train import to_tensor as images_to_tensor

TIME_SCALE, TIME_SHIFT = 1.2, 0.3  # flow times are sigmoid(1.2 n + 0.3): more of the noisy half
DROP_TEXT, DROP_IMAGE = 0.1, 0.1
OPEN_PROMPTS = 0.1  # share of drawings whose prompt names the things only
DESCRIBE_WEIGHT, THINK_WEIGHT = 0.4, 0.4  # per token, an answer's token being 1
Turns = tuple[tuple[str, int | None], ...]
# Kinds of edits with the number of things (None: even odds), in turn. Four in ten recolour one of two things: the thing
# that is named must be found and the other one left alone. At one in eight this was learnt for 14 % of the pairs.
EDIT_TURNS: Turns = (
    ("recolor", 2), ("background", None), ("recolor", 2), ("remove", 2), ("recolor", 1),
    ("recolor", 2), ("move", 1), ("recolor", 2), ("remove", 2), ("background", None),
)  # fmt: skip
# For the last phase: at two in ten, removing was learnt later than recolouring.
BIND_TURNS: Turns = (
    ("remove", 2), ("recolor", 2), ("remove", 2), ("move", 1), ("remove", 2),
    ("recolor", 2), ("remove", 2), ("background", None), ("recolor", 2), ("remove", 2),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mix:
    """Samples of each task in one step, noised copies of each generated picture, questions about each seen one."""

    draw: int = 24
    ask: int = 8
    edit: int = 10
    think: int = 3
    draw_copies: int = 3
    edit_copies: int = 2
    questions: int = 3


@dataclass(frozen=True, slots=True)
class Pool:
    """Scenes and edits with their latents [tokens, p*p*z], in the same order."""

    scenes: Sequence[Scene]
    latents: Tensor
    edits: Sequence[Edit]
    before: Tensor
    after: Tensor


def make_pool(vae: AutoEncoder, seed: int, scenes: int, edits: int, turns: Turns = EDIT_TURNS) -> Pool:
    """Draws scenes and edits and encodes them. Edit kinds take turns."""
    rng = np.random.default_rng((seed, 1))
    drawn = [sample_scene(rng) for _ in range(scenes)]
    changed = [language.sample_edit(rng, *turns[i % len(turns)]) for i in range(edits)]
    return Pool(
        drawn,
        encoded(vae, drawn, seed),
        changed,
        encoded(vae, [e.before for e in changed], seed + 1),
        encoded(vae, [e.after for e in changed], seed + 2),
    )


@torch.no_grad()
def encoded(vae: AutoEncoder, scenes: Sequence[Scene], seed: int) -> Tensor:
    """Packed latents [scenes, tokens, p*p*z], sampled."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(scenes), 32):
        images = images_to_tensor(np.stack([render(s) for s in scenes[start : start + 32]]))
        side = images.shape[-1] // vae.config.downsample
        noise = torch.randn((len(images), vae.config.z_channels, side, side), generator=generator)
        parts += [patchify(z, CONFIG.latent_patch_size) for z in vae.encode(images, noise)]
    return torch.stack(parts) if parts else torch.zeros(0)


def patches_of(scene: Scene) -> Tensor:
    """What the ViT sees of a scene: [patches, 588], resized as the sampler does."""
    image = resized(Image.fromarray(render(scene)), CONFIG.vit_rule)
    return patchify(to_tensor(image), CONFIG.vit.patch_size)


class Tasks:
    """Makes the samples of a step."""

    def __init__(self, text: TextCodec, pool: Pool | None, mix: Mix, seed: int) -> None:
        self._text, self._pool, self._mix, self._seed = text, pool, mix, seed
        self._turns: dict[str, list[int]] = {}

    def samples(self, step: int) -> list[list[Item]]:
        """All samples of a step."""
        rng = np.random.default_rng((self._seed, 2, step))
        mix = self._mix
        asked = [self._ask(rng) for _ in range(mix.ask)]
        if self._pool is None:
            return asked
        drawn = [self._draw(rng, self._pool) for _ in range(mix.draw)]
        edited = [self._edit(rng, self._pool) for _ in range(mix.edit)]
        thought = [self._think(rng, self._pool) for _ in range(mix.think)]
        return drawn + asked + edited + thought

    def _ask(self, rng: np.random.Generator) -> list[Item]:
        scene = sample_scene(rng)
        kinds = rng.permutation(language.kinds_for(scene))[: self._mix.questions]
        asked = [language.question(scene, str(kind), rng) for kind in kinds]
        describe = self._asks(language.DESCRIBE, language.caption(scene), DESCRIBE_WEIGHT)
        return [ViTPatches(patches_of(scene)), describe, *(self._asks(q.text, q.answer, 1.0) for q in asked)]

    def _asks(self, question: str, answer: str, weight: float) -> Branch:
        return Branch((self._turn(question), self._turn(answer, weight)))

    def _draw(self, rng: np.random.Generator, pool: Pool) -> list[Item]:
        index = int(rng.integers(len(pool.scenes)))
        scene = pool.scenes[index]
        names = " and ".join(language.one(t.name) for t in scene.things)
        prompt = names if rng.random() < OPEN_PROMPTS else language.caption(scene, rng)
        head = [] if rng.random() < DROP_TEXT else [self._turn(prompt)]
        return [*head, *_copies(rng, pool.latents[index], self._mix.draw_copies)]

    def _edit(self, rng: np.random.Generator, pool: Pool) -> list[Item]:
        index = int(rng.integers(len(pool.edits)))
        edit = pool.edits[index]
        dropped = rng.random()
        copies = _copies(rng, pool.after[index], self._mix.edit_copies)
        if dropped < DROP_IMAGE:
            return [self._turn(edit.text), *copies]
        images: list[Item] = [Latent(pool.before[index]), ViTPatches(patches_of(edit.before))]
        return [*images, *([] if dropped < DROP_IMAGE + DROP_TEXT else [self._turn(edit.text)]), *copies]

    def _think(self, rng: np.random.Generator, pool: Pool) -> list[Item]:
        index = int(rng.integers(len(pool.scenes)))
        plan = ThinkTask(*_plan_of(rng, pool.scenes[index]))
        thoughts = [self._turn(plan.prompt), self._turn(plan.thoughts, THINK_WEIGHT)]
        head = [] if rng.random() < DROP_TEXT else thoughts
        return [self._turn(THINK_IMAGE), *head, *_copies(rng, pool.latents[index], self._mix.edit_copies)]

    def _turn(self, text: str, weight: float = 0.0) -> TextTurn:
        if text not in self._turns:
            self._turns[text] = self._text.turn(text)
        return TextTurn(self._turns[text], weight)


def _copies(rng: np.random.Generator, latent: Tensor, count: int) -> list[Item]:
    return [Latent(latent, float(TIME_SCALE * rng.standard_normal() + TIME_SHIFT)) for _ in range(count)]


def _plan_of(rng: np.random.Generator, scene: Scene) -> tuple[str, str, Scene]:
    names = [language.one(scene.things[int(i)].name) for i in rng.permutation(len(scene.things))]
    return " and ".join(names), language.thoughts(scene), scene
