"""The rows that enter the first layer: embedded tokens, ViT features, latents with their times.

Only the parts in front of the layers are built, from the full-precision checkpoint: embedding, ViT, connector, bridges
and position tables. They are mapped from the file where it holds bf16, so that they cost little anonymous memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bagel.loading import parameter_path, put, unfilled
from bagel.model import Bagel
from bagel_compress.calibrate.calibration_set import (
    CalibrationSet,
    CleanLatent,
    DecodedText,
    ImagePass,
    NoisedLatent,
    TextPass,
)
from bagel_compress.calibrate.layout import Layout, Pass
from bagel_compress.codecs.base import Reader
from bagel_compress.errors import CalibrationError
from bagel_compress.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from bagel.config import BagelConfig

FRONT = ("embed_tokens.", "vit.", "connector.", "vit_pos_embed.", "vae2llm.", "latent_pos_embed.", "time_embedder.")


def first_rows(
    calibration: CalibrationSet,
    layout: Layout,
    config: BagelConfig,
    specs: Mapping[str, TensorSpec],
    source: Reader,
    wrap: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    keep: torch.dtype = torch.bfloat16,
) -> Tensor:
    """[total, D] in `keep` on the CPU, computed in `dtype` on `device`.

    `specs` by official name; `wrap`: ids of the wrapper tokens.

    Raises CalibrationError, naming the sequence, if a latent of the set holds NaN or Inf.
    """
    front = _front(config, specs, source, device, dtype)
    rows = torch.empty(layout.total, config.llm.hidden_size, dtype=keep)
    start, end = front.embed_tokens(torch.tensor(wrap, device=device)).split(1)
    seen: dict[int, Tensor] = {}
    for sequence, reading in zip(layout.sequences, calibration.header.sequences, strict=True):
        for p in sequence:
            if isinstance(p.item, TextPass | DecodedText):
                inside = front.embed_tokens(torch.tensor(p.item.ids, device=device))
            elif isinstance(p.item, ImagePass):
                if p.item.picture not in seen:
                    seen[p.item.picture] = _features(front, calibration.picture(p.item.picture)).to("cpu", keep)
                inside = torch.cat([start, seen[p.item.picture].to(device, dtype), end])
            else:
                inside = torch.cat([start, _latents(front, calibration, p, reading.name, wrap), end])
            rows[p.rows] = inside.to("cpu", keep)
    return rows


def _front(
    config: BagelConfig, specs: Mapping[str, TensorSpec], source: Reader, device: torch.device, dtype: torch.dtype
) -> Bagel:
    """A model whose layers, norms and head stay without weights. The embedding keeps the checkpoint's bf16."""
    with unfilled():
        model = Bagel(config)
    for name, spec in specs.items():
        path = parameter_path(name)
        if path.startswith(FRONT):
            values = source.read(spec, 0, spec.numel).reshape(spec.shape)
            wanted = torch.bfloat16 if path.startswith("embed_tokens.") else dtype
            put(model, path, nn.Parameter(values.to(device, wanted), requires_grad=False))
    model.norm_und.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)
    return model.eval()


@torch.no_grad()
def _features(front: Bagel, picture: Tensor) -> Tensor:
    """[patches, D] of a picture, uint8 [H, W, 3]."""
    pixels = (picture.permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    return front.image_features([pixels.to(front.device)])[0]


@torch.no_grad()
def _latents(front: Bagel, calibration: CalibrationSet, p: Pass, name: str, wrap: tuple[int, int]) -> Tensor:
    assert isinstance(p.item, CleanLatent | NoisedLatent)
    latent = calibration.latent(p.item.latent)
    if not bool(torch.isfinite(latent).all()):
        raise CalibrationError(
            f"calibration set {calibration.path}: latent {p.item.latent} of {name} holds NaN or Inf; make it again."
        )
    time = torch.tensor(p.item.time if isinstance(p.item, NoisedLatent) else 0.0)
    block = front.noisy_block(latent.flatten(0, 1), time, [(latent.shape[0], latent.shape[1])], wrap)
    return block.latents
