"""The batched training forward gives the losses of the packed one (limit: 1e-4 relative L2, fp32)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bagel import training
from bagel.inputs import TextCodec
from bagel.loading import load_bagel
from bagel.vit import patchify
from bagel_compress.nano_training import forward as nano

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "checkpoint"
LIMIT = 1e-4


@pytest.fixture(scope="module")
def text() -> TextCodec:
    return TextCodec.from_dir(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return load_bagel(CHECKPOINT, torch.device("cpu"), torch.float32)


def rel_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def test_equals_the_packed_forward(model, text: TextCodec) -> None:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    prompts = ["a red cat", "the old house looks at the moon", "a"]
    noised = [[(draw(16, 8, 8), float(draw(1))) for _ in range(2)] for _ in prompts]
    image, clean, target = draw(3, 84, 84), draw(16, 8, 8), draw(16, 8, 8)
    asked = [("what is this?", "a cat"), ("where is the moon and the sun?", "left")]
    official = [
        *(
            [training.TextItem(p), *(training.LatentItem(x, t) for x, t in pictures)]
            for p, pictures in zip(prompts, noised, strict=True)
        ),
        *([training.ViTItem(image), training.TextItem(q), training.TextItem(a, loss=True)] for q, a in asked),
        [
            training.LatentItem(clean),
            training.ViTItem(image),
            training.TextItem("redder"),
            training.LatentItem(target, 0.3),
        ],
    ]

    def packed(x: torch.Tensor) -> torch.Tensor:
        return patchify(x, 2)

    def asks(q: str, a: str) -> nano.Branch:
        return nano.Branch((nano.TextTurn(text.turn(q)), nano.TextTurn(text.turn(a), 1.0)))

    patches = patchify(image, 14)
    ours = [
        *(
            [nano.TextTurn(text.turn(p)), *(nano.Latent(packed(x), t) for x, t in pictures)]
            for p, pictures in zip(prompts, noised, strict=True)
        ),
        [nano.ViTPatches(patches), *(asks(q, a) for q, a in asked)],
        [
            nano.Latent(packed(clean)), nano.ViTPatches(patches), nano.TextTurn(text.turn("redder")),
            nano.Latent(packed(target), 0.3),
        ],
    ]  # fmt: skip
    groups = nano.grouped(text, ours, 16, 64)
    assert [(x.size, x.patches.shape[1], x.latents.shape[1]) for x in groups] == [(3, 0, 2), (1, 1, 0), (1, 1, 2)]
    noise = [torch.randn(x.latents.shape, generator=g) for x in groups]
    found = nano.forward(model, groups, noise)

    batch = training.pack(model, text, official)
    flat = torch.cat([noise[0].reshape(-1, 64), noise[2].reshape(-1, 64)])
    expected = training.forward(model, batch, flat)
    assert rel_l2(found.ce, expected.ce) < LIMIT
    assert rel_l2(found.mse, expected.mse) < LIMIT


def test_no_slot_sees_padding_or_another_branch() -> None:
    slots = np.array([[(0, 1, 1, 0, 0), (1, 2, 2, 1, 0), (1, 3, 3, 2, 0), (0, 0, 0, 0, -1)]])
    seen = (nano.attention_mask(slots)[0, 0] == 0).tolist()
    assert seen == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, True, False],
        [False, False, False, True],
    ]
