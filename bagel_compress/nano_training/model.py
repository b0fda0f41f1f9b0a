"""The nano model's sizes and its fresh weights.

Hidden 128 in 6 layers with two experts, a ViT of three layers on a 6 x 6 grid: a 4 x 4 grid hid shape and place.
Weights start at 1/sqrt(fan in), the outputs of attention and MLP smaller by sqrt(2 * layers), and embeddings near the
size of the sin-cos rows (about 0.7), so that neither drowns the other. The ViT's own position rows start large for the
same reason.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bagel.config import BagelConfig, LLMConfig, ResizeRule, ViTConfig
from bagel.model import Bagel
from bagel.nano.scenes import SIDE
from bagel_compress.nano_training.vae_train import CONFIG as VAE

VOCAB = 512  # 503 tokens, padded to a multiple of 64
VIT_SIDE = 84  # 6 x 6 patches
CONFIG = BagelConfig(
    llm=LLMConfig(128, 320, 6, 4, 2, VOCAB),
    vit=ViTConfig(128, 256, 3, 4),
    latent_patch_size=2,
    latent_channels=VAE.z_channels,
    max_latent_size=8,
    vit_max_patches=8,
    vae_downsample=VAE.downsample,
    vae_rule=ResizeRule(SIDE, SIDE, 2 * VAE.downsample),
    vit_rule=ResizeRule(VIT_SIDE, VIT_SIDE, 14),
    default_size=SIDE,
)
LATENT_TOKENS = (SIDE // CONFIG.image_stride) ** 2
EMBEDDING_STD = 0.5


def build(seed: int) -> Bagel:
    """A model with fresh weights, fp32. Position tables are constants."""
    generator = torch.Generator().manual_seed(seed)
    model = Bagel(CONFIG)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("pos_embed.pos_embed"):
                p.copy_(_fresh(name, p, generator))
    return model


def trained(model: Bagel) -> dict[str, Tensor]:
    """The parameters that are trained, by their path in the model: all but the two position tables."""
    return {n: p for n, p in model.named_parameters() if not n.endswith("pos_embed.pos_embed")}


def inner_matrices(model: Bagel) -> set[str]:
    """Paths of the matrices inside decoder and ViT layers and the connector: what Muon trains."""
    inside = ("layers.", "vit.layers.", "connector.")
    return {n for n, p in trained(model).items() if p.ndim == 2 and n.startswith(inside)}


def _fresh(name: str, p: Tensor, generator: torch.Generator) -> Tensor:
    if p.ndim == 1:
        return torch.ones_like(p) if "norm" in name and name.endswith("weight") else torch.zeros_like(p)
    if name.startswith(("embed_tokens", "vit.position_embedding")):
        return EMBEDDING_STD * torch.randn(p.shape, generator=generator)
    std = 1 / math.sqrt(p.shape[1])
    if ".o_proj" in name or ".down_proj" in name:
        std /= math.sqrt(2 * CONFIG.llm.num_layers)
    if name.startswith(("llm2vae", "lm_head")):
        std *= 0.1  # first guesses near zero
    return std * torch.randn(p.shape, generator=generator)
