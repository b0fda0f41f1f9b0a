"""A first lesson for the ViT: what does each patch show?

The released BAGEL starts from a SigLIP tower that already sees. A tower from scratch learns far too slowly from
one-word answers (place and shape stayed at chance), so it is first taught densely: linear heads on the features of
every patch name the thing in it (colour, shape, place), the background and the number of things. The heads are thrown
away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bagel.inputs import grid_ids
from bagel.model import Bagel
from bagel.nano.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIDE, Scene, coverage, sample_scene
from bagel_compress.nano_training.batches import patches_of
from bagel_compress.nano_training.model import CONFIG, VIT_SIDE

GRID = VIT_SIDE // CONFIG.vit.patch_size
MIN_COVER = 0.15  # share of a patch that a thing must cover to be named there
HEADS: dict[str, int] = {  # name -> classes; for things, class 0 is "nothing here"
    "color": 1 + len(COLORS),
    "shape": 1 + len(SHAPES),
    "place": 1 + len(PLACES),
    "background": len(BACKGROUNDS),
    "count": 2,
}


def heads(seed: int) -> nn.Linear:
    """One linear layer for all heads, classes in the order of HEADS."""
    layer = nn.Linear(CONFIG.vit.hidden_size, sum(HEADS.values()))
    with torch.no_grad():
        layer.weight.copy_(0.02 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)))
        nn.init.zeros_(layer.bias)
    return layer


def loss(model: Bagel, head: nn.Linear, rng: np.random.Generator, batch: int) -> tuple[Tensor, Mapping[str, float]]:
    """Mean cross entropy over patches and heads, and the accuracy of each head on patches that show something."""
    scenes = [sample_scene(rng) for _ in range(batch)]
    patches = torch.cat([patches_of(s) for s in scenes])
    ids = grid_ids(GRID, GRID, CONFIG.vit_max_patches).repeat(batch)
    logits = head(model.vit(patches, ids, [GRID * GRID] * batch))
    labels = torch.from_numpy(_labels(scenes))
    total = logits.new_zeros(())
    metrics = {}
    for index, (name, part) in enumerate(zip(HEADS, logits.split(list(HEADS.values()), -1), strict=True)):
        total = total + cross_entropy(part, labels[:, index])
        shows = labels[:, 0] > 0
        metrics[name] = float((part.detach().argmax(-1) == labels[:, index])[shows].float().mean())
    return total / len(HEADS), metrics


def _labels(scenes: Sequence[Scene]) -> NDArray[np.int64]:
    """[scenes * patches, heads]."""
    labels = np.zeros((len(scenes), GRID * GRID, len(HEADS)), np.int64)
    for row, scene in zip(labels, scenes, strict=True):
        for thing in scene.things:
            cover = _CELLS @ coverage(thing.shape, thing.x, thing.y, thing.radius) @ _CELLS.T
            here = cover.ravel() > MIN_COVER
            row[here, 0] = 1 + list(COLORS).index(thing.color)
            row[here, 1] = 1 + SHAPES.index(thing.shape)
            row[here, 2] = 1 + list(PLACES).index(thing.place)
        row[:, 3] = list(BACKGROUNDS).index(scene.background)
        row[:, 4] = len(scene.things) - 1
    return labels.reshape(-1, len(HEADS))


def _cells() -> NDArray[np.float32]:
    """[GRID, SIDE]: share of each pixel row that lies in each cell, rows summing to 1."""
    edges = np.linspace(0, SIDE, GRID + 1)
    low, high = np.maximum.outer(edges[:-1], np.arange(SIDE)), np.minimum.outer(edges[1:], np.arange(1, SIDE + 1))
    return (np.clip(high - low, 0, None) / (SIDE / GRID)).astype(np.float32)


_CELLS = _cells()
