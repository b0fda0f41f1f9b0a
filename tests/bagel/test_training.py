"""The packer lays a batch out as the official one, and the loss can be trained."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from bagel.inputs import resized, to_rgb, to_tensor
from bagel.sampler import Sampler
from bagel.training import LatentItem, TextItem, ViTItem, forward, pack, visibility

PROMPT, QUESTION = (
    "a red cat sits on the old house and looks at the moon",
    "What is in the picture, and why is it blue?",
)


def test_packer_gives_the_official_layout(fp32: Sampler, golden: Path) -> None:
    from PIL import Image

    given = load_file(golden / "traces" / "train.fp32.safetensors")
    first, second = (
        ViTItem(to_tensor(resized(to_rgb(Image.open(golden / "traces" / f"img_{n}.png")), fp32.bagel.config.vit_rule)))
        for n in "ab"
    )
    clean, noised = given["in.padded_latent"][0][:, :8, :12], given["in.padded_latent"][1][:, :10, :6]
    answer = fp32.text.decode(given["in.packed_label_ids"][:-1].tolist())
    samples = [
        [LatentItem(clean), first, TextItem(PROMPT), LatentItem(noised, float(given["in.packed_timesteps"][-1]))],
        [second, TextItem(QUESTION), TextItem(answer, loss=True)],
    ]
    batch = pack(fp32.bagel, fp32.text, samples)
    for mine, name in {
        "text_ids": "packed_text_ids", "text_rows": "packed_text_indexes", "positions": "packed_position_ids",
        "latent_ids": "packed_latent_position_ids", "latent_rows": "packed_vae_token_indexes",
        "vit_rows": "packed_vit_token_indexes", "vit_ids": "packed_vit_position_ids", "timesteps": "packed_timesteps",
        "mse_rows": "mse_loss_indexes", "ce_rows": "ce_loss_indexes", "labels": "packed_label_ids",
    }.items():  # fmt: skip
        assert torch.equal(getattr(batch, mine), given[f"in.{name}"]), mine
    for i, visible in enumerate(batch.visible):
        assert torch.equal(visible, given[f"in.attn_visible{i}"])
    with torch.no_grad():
        losses = forward(fp32.bagel, batch, given["noise"])
    assert (losses.ce - given["ce"]).norm() / given["ce"].norm() < 1e-4
    assert (losses.mse - given["mse"]).norm() / given["mse"].norm() < 1e-4


def test_noised_images_are_seen_by_nobody_else() -> None:
    visible = visibility([("causal", 2), ("noise", 3), ("full", 2), ("causal", 2)])
    assert visible[2:5, 2:5].all()
    assert not visible[5:, 2:5].any()
    assert not visible[:2, 2:].any()
    assert visible[5:7, 5:7].all()
    assert not visible[7, 8]


def test_text_only_and_image_only_batches(fp32: Sampler) -> None:
    config = fp32.bagel.config
    for items in ([TextItem("a cat", loss=True)], [LatentItem(torch.randn(config.latent_channels, 4, 4), 0.3)]):
        batch = pack(fp32.bagel, fp32.text, [items])
        with torch.no_grad():
            losses = forward(fp32.bagel, batch, torch.randn_like(batch.latents))
        assert losses.ce.numel() + losses.mse.numel() > 0
        assert torch.isfinite(losses.hidden).all()
