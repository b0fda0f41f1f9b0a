"""The FLUX autoencoder: pixels to latents and back.

Written in the layout of the released `ae.safetensors` (`encoder.down.0.block.0.conv1.weight` ...), so that a state dict
loads as it is. The sizes are read off the tensor shapes; scale and shift are constants, since shapes cannot tell them.
The upstream quirks are kept: encoding is always sampled, downsampling pads right and bottom only, and pixels are
truncated to uint8. It computes in the dtype of its weights, without autocast; it does not tile.

Shape suffixes: B images, C channels, H and W pixels, Z latent channels, h and w latent cells, N = h * w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.config import VAE_SCALE, VAE_SHIFT

NORM_GROUPS = 32
NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """Sizes of the autoencoder. Defaults: the released BAGEL (FLUX.1) one."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3
    out_channels: int = 3
    scale_factor: float = VAE_SCALE
    shift_factor: float = VAE_SHIFT

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along a side: each level but the last halves."""
        return 1 << (len(self.ch_mult) - 1)

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, Sequence[int]],
        scale_factor: float = VAE_SCALE,
        shift_factor: float = VAE_SHIFT,
    ) -> VAEConfig:
        """Sizes from the tensor shapes of `ae.safetensors`. Raises ValueError if they are not an autoencoder's."""
        try:
            ch = shapes["encoder.conv_in.weight"][0]
            levels = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.down."))
            rows = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
            blocks = {name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")}
            z_channels = shapes["decoder.conv_in.weight"][1]
            in_channels = shapes["encoder.conv_in.weight"][1]
            out_channels = shapes["decoder.conv_out.weight"][0]
        except (KeyError, ValueError) as error:
            raise ValueError(f"Not the tensors of a FLUX autoencoder: {error} is missing.") from error
        return cls(
            ch,
            tuple(r // ch for r in rows),
            len(blocks),
            z_channels,
            in_channels,
            out_channels,
            scale_factor,
            shift_factor,
        )


class AutoEncoder(nn.Module):
    """Encoder and decoder with the latent's scale and shift between them."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Image in [-1, 1], sides multiples of `downsample` -> posterior mean and log-variance, each [B, Z, h, w]."""
        mean, logvar = self.encoder(image_BCHW).chunk(2, dim=1)
        return mean, logvar

    def encode(self, image_BCHW: Tensor, noise_BZhw: Tensor) -> Tensor:
        """Image in [-1, 1] -> latent [B, Z, h, w], sampled with the given standard normal noise, scaled and shifted."""
        mean, logvar = self.moments(image_BCHW)
        z_BZhw = mean + torch.exp(0.5 * logvar) * noise_BZhw
        return self.config.scale_factor * (z_BZhw - self.config.shift_factor)

    def decode(self, latent_BZhw: Tensor) -> Tensor:
        """Scaled latent -> image [B, 3, H, W], nominal range [-1, 1], not clamped."""
        z_BZhw = latent_BZhw / self.config.scale_factor + self.config.shift_factor
        return cast(Tensor, self.decoder(z_BZhw))


def to_uint8(image: Tensor) -> Tensor:
    """Nominal [-1, 1] -> uint8 of the same shape: clamped, times 255, truncated (not rounded), as upstream does."""
    return (image.float() * 0.5 + 0.5).clamp(0, 1).mul(255).to(torch.uint8)


class Encoder(nn.Module):
    """Image -> 2 * z_channels moments. `down.{level}.block.{n}`, then `mid`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.conv_in = _conv3(config.in_channels, config.ch)
        width = config.ch
        self.down = nn.ModuleList()
        for level, mult in enumerate(config.ch_mult):
            last = level == len(config.ch_mult) - 1
            stage = _Stage(width, config.ch * mult, config.num_res_blocks, downsample=not last)
            self.down.append(stage)
            width = config.ch * mult
        self.mid = Middle(width)
        self.norm_out = _norm(width)
        self.conv_out = _conv3(width, 2 * config.z_channels)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x = self.conv_in(image_BCHW)
        for stage in self.down:
            x = stage(x)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    """Latent -> image. `up.{level}` is numbered like the encoder's levels, so the highest runs first."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.ch * config.ch_mult[-1]
        self.conv_in = _conv3(config.z_channels, width)
        self.mid = Middle(width)
        stages: list[nn.Module] = []
        for level in reversed(range(len(config.ch_mult))):
            out = config.ch * config.ch_mult[level]
            stages.append(_Stage(width, out, config.num_res_blocks + 1, upsample=level > 0))
            width = out
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = _norm(width)
        self.conv_out = _conv3(width, config.out_channels)

    def forward(self, z_BZhw: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z_BZhw))
        for stage in reversed(self.up):
            x = stage(x)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(x))))


class ResBlock(nn.Module):
    """norm, swish, conv, twice, plus the input (through `nin_shortcut` where the width changes)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(c_in)
        self.conv1 = _conv3(c_in, c_out)
        self.norm2 = _norm(c_out)
        self.conv2 = _conv3(c_out, c_out)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return cast(Tensor, h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x))


class Attention(nn.Module):
    """Single-head attention over all positions; q, k, v and proj_out are 1x1 convolutions."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = _norm(c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        normed = self.norm(x_BChw)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2).contiguous() for conv in (self.q, self.k, self.v))
        out_BNC = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return cast(Tensor, x_BChw + self.proj_out(out_BNC.transpose(1, 2).reshape(x_BChw.shape)))


class Middle(nn.Module):
    """The lowest resolution: block, attention, block."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(c, c)
        self.attn_1 = Attention(c)
        self.block_2 = ResBlock(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block_2(self.attn_1(self.block_1(x))))


class Downsample(nn.Module):
    """Stride-2 convolution; zero padding of one column right and one row bottom only."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Nearest neighbour times two, then a convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = _conv3(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class _Stage(nn.Module):
    """One resolution: blocks, then the change to the next resolution, if there is one."""

    def __init__(self, c_in: int, c_out: int, blocks: int, *, downsample: bool = False, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if n == 0 else c_out, c_out) for n in range(blocks))
        if downsample:
            self.downsample = Downsample(c_out)
        if upsample:
            self.upsample = Upsample(c_out)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for change in ("downsample", "upsample"):
            if hasattr(self, change):
                x = getattr(self, change)(x)
        return x


def _conv3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def _norm(c: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, c, eps=NORM_EPS)
