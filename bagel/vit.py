"""SigLIP-NaViT encoder and the connector: images of any size, packed on one axis, to rows of the language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from bagel.config import ViTConfig
from bagel.layers import WideLayerNorm, attention, linear_dtype


class ViTAttention(nn.Module):
    """Full attention inside each image; all four projections have biases."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x_PD: Tensor, lens: Sequence[int]) -> Tensor:
        q, k, v = (
            project(x_PD).unflatten(-1, (self.num_heads, -1)).split(list(lens))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q, k, v, causal=False).flatten(1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """fc1, tanh-approximated GELU, fc2. Serves the ViT's layers and the connector."""

    def __init__(self, width_in: int, width_hidden: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, width_hidden)
        self.fc2 = nn.Linear(width_hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x.to(linear_dtype(self.fc1))), approximate="tanh"))  # type: ignore[no-any-return]


class ViTLayer(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layer_norm1 = WideLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = ViTAttention(config)
        self.layer_norm2 = WideLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, x_PD: Tensor, lens: Sequence[int]) -> Tensor:
        x_PD = x_PD + self.self_attn(self.layer_norm1(x_PD).to(x_PD.dtype), lens)
        return x_PD + self.mlp(self.layer_norm2(x_PD))


class ViT(nn.Module):
    """Patches to features. The last SigLIP block is dropped upstream, post_layernorm is kept; there is no pooling."""

    def __init__(self, config: ViTConfig, max_patches_per_side: int) -> None:
        super().__init__()
        patch_values = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_values, config.hidden_size)
        self.position_embedding = nn.Embedding(max_patches_per_side**2, config.hidden_size)
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_layers))
        self.post_layernorm = WideLayerNorm(config.hidden_size, config.layer_norm_eps)

    def embed(self, patches_PC: Tensor, ids_P: Tensor) -> Tensor:
        """Patch values and their position ids -> [P, D]."""
        dtype = linear_dtype(self.patch_embedding)
        return self.patch_embedding(patches_PC.to(dtype)) + self.position_embedding(ids_P)  # type: ignore[no-any-return]

    def forward(self, patches_PC: Tensor, ids_P: Tensor, lens: Sequence[int]) -> Tensor:
        """Features [P, D] in fp32; `lens` are the patch counts of the packed images."""
        x_PD = self.embed(patches_PC, ids_P)
        for layer in self.layers:
            x_PD = layer(x_PD, lens)
        return self.post_layernorm(x_PD)  # type: ignore[no-any-return]


def patchify(image_CHW: Tensor, patch: int) -> Tensor:
    """[C, H, W] -> [patches, patch*patch*C]: row-major patches, each flattened in (row, column, channel) order."""
    channels, height, width = image_CHW.shape
    cells = image_CHW.reshape(channels, height // patch, patch, width // patch, patch)
    return torch.einsum("chpwq->hwpqc", cells).reshape(-1, patch * patch * channels)
