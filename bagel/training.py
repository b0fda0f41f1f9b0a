"""The packed training forward: cross entropy on text, flow matching on noised images.

A batch is samples of items (text, ViT image, clean image, noised image) packed on one axis. `pack` lays them out by the
official rules; `forward` returns unreduced losses, so that parity of a loss is the cheapest check of all. No optimiser,
no data loading and no reduction here.

Visibility: a query sees a key of its own sample when the key comes first or both are in the same image, and never a key
of another noised image: later tokens see the clean copy only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from bagel.inputs import TextCodec, grid_ids
from bagel.layers import linear_dtype, rope_table, sdpa
from bagel.model import Bagel
from bagel.vit import patchify


@dataclass(frozen=True, slots=True)
class TextItem:
    """A wrapped text turn; with `loss`, every id after the first is predicted, the end token too."""

    text: str
    loss: bool = False


@dataclass(frozen=True, slots=True)
class TokenItem:
    """A text turn as token ids, wrapper tokens included; `loss` as in TextItem."""

    ids: tuple[int, ...]
    loss: bool = False


@dataclass(frozen=True, slots=True)
class ViTItem:
    """An image as ViT features, [3, H, W] in [-1, 1]."""

    image: Tensor


@dataclass(frozen=True, slots=True)
class LatentItem:
    """An image as VAE latent [z, h, w]: clean (`timestep` None), or noised at sigmoid(timestep), shifted, with loss."""

    latent: Tensor
    timestep: float | None = None


@dataclass(frozen=True, slots=True)
class DroppedImage:
    """An image that was left out so that guidance can be learnt: no rows, but it takes its rope position."""


Item = TextItem | TokenItem | ViTItem | LatentItem | DroppedImage


@dataclass(slots=True)
class PackedBatch:
    """A packed batch of T rows. Row indexes count over the whole batch."""

    sample_lens: list[int]
    visible: list[Tensor]  # per sample [len, len] bool: row (query) may see column (key)
    positions: Tensor  # [T] rope positions
    text_ids: Tensor
    text_rows: Tensor  # wrapper tokens of images included
    vit_patches: Tensor
    vit_ids: Tensor
    vit_rows: Tensor
    vit_lens: list[int]
    latents: Tensor  # [N, p*p*z] clean, packed
    latent_ids: Tensor
    latent_rows: Tensor
    timesteps: Tensor  # [N] before the sigmoid; -inf is clean
    mse_rows: Tensor
    ce_rows: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch with all tensors on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved |= {name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)}
        return PackedBatch(**moved | {"visible": [mask.to(device) for mask in self.visible]})


@dataclass(frozen=True, slots=True)
class Losses:
    """Unreduced: `ce` per predicted token, `mse` per element of noised tokens. `hidden`: rows after the final norms."""

    ce: Tensor
    mse: Tensor
    hidden: Tensor


def forward(model: Bagel, batch: PackedBatch, noise: Tensor, recompute: bool = False) -> Losses:
    """Losses of a batch; `noise` is standard normal, [N, p*p*z].

    `recompute`: a layer keeps only its input for the backward pass, which runs it again (gradient checkpointing).
    """
    t = shifted_times(batch.timesteps, model.config.timestep_shift)
    x_t = (1 - t[:, None]) * batch.latents + t[:, None] * noise
    und_rows, order = _expert_order(batch)
    x_TD = _embed(model, batch, x_t, t)[order]
    llm = model.config.llm
    rope = rope_table(batch.positions[order], llm.head_dim, llm.rope_theta, x_TD.dtype)
    attend = _attend_with(batch, order)
    for layer in model.layers:
        x_TD = _run(layer, recompute, x_TD, len(und_rows), rope, attend, True)
    normed_TD = torch.cat([model.norm_und(x_TD[: len(und_rows)]), model.norm_gen(x_TD[len(und_rows) :])])
    hidden_TD = torch.empty_like(normed_TD).index_copy(0, order, normed_TD)
    ce = _run(partial(_cross_entropy, model), recompute, hidden_TD[batch.ce_rows], batch.labels)
    noised = torch.searchsorted(batch.latent_rows, batch.mse_rows)
    target = (noise - batch.latents)[noised]
    mse = (model.llm2vae(hidden_TD[batch.mse_rows]).float() - target) ** 2
    return Losses(ce, mse, hidden_TD)


def _run(work: Callable[..., Tensor], recompute: bool, *args: Any) -> Tensor:
    if not recompute:
        return work(*args)
    return checkpoint(work, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def _cross_entropy(model: Bagel, hidden_TD: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model.lm_head(hidden_TD).float(), labels, reduction="none")


def shifted_times(draws: Tensor, shift: float) -> Tensor:
    """sigmoid, then s*t / (1 + (s-1)*t); -inf stays 0."""
    t = torch.sigmoid(draws)
    return shift * t / (1 + (shift - 1) * t)


def _expert_order(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """(understanding rows, all rows in expert order): everything but latents first."""
    und_rows = torch.cat([batch.text_rows, batch.vit_rows]).sort().values
    return und_rows, torch.cat([und_rows, batch.latent_rows])


def _embed(model: Bagel, batch: PackedBatch, x_t: Tensor, t: Tensor) -> Tensor:
    text = model.embed_tokens(batch.text_ids)
    x_TD = text.new_zeros(sum(batch.sample_lens), text.shape[1]).index_copy(0, batch.text_rows, text)
    if batch.vit_lens:
        features = model.connector(model.vit(batch.vit_patches, batch.vit_ids, batch.vit_lens))
        features = features + model.vit_pos_embed(batch.vit_ids)
        x_TD = x_TD.index_copy(0, batch.vit_rows, features.to(x_TD.dtype))
    elif model.training:  # one patch that nobody sees: on several GPUs all parameters need a gradient, be it zero
        one = batch.vit_patches.new_zeros(1, model.vit.patch_embedding.in_features)
        features = model.connector(model.vit(one, batch.positions.new_zeros(1), [1]))
        x_TD = x_TD + 0 * features.sum().to(x_TD.dtype)
    if len(batch.latent_rows) or model.training:
        projected = model.vae2llm(x_t.to(linear_dtype(model.vae2llm)))
        latents = projected + model.time_embedder(t) + model.latent_pos_embed(batch.latent_ids)
        x_TD = x_TD.index_copy(0, batch.latent_rows, latents.to(x_TD.dtype))
    return x_TD


def _attend_with(batch: PackedBatch, order: Tensor) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """Attention per sample under its visibility; rows come and go in expert order."""
    inverse = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))

    def attend(_: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        packed = [t[inverse].split(batch.sample_lens) for t in (q_THE, k_TKE, v_TKE)]
        outs = [
            sdpa(*(t.transpose(0, 1)[None] for t in qkv), mask=mask)[0].transpose(0, 1)  # type: ignore[misc]
            for *qkv, mask in zip(*packed, batch.visible, strict=True)
        ]
        return torch.cat(outs)[order]

    return attend


# --- packing ----------------------------------------------------------------------------------------------------------


class _Packer:
    """Collects the rows of a batch while samples are packed."""

    def __init__(self, model: Bagel, text: TextCodec) -> None:
        self.config, self.text = model.config, text
        self.rows: dict[str, list[int]] = {k: [] for k in ("text", "vit", "latent", "mse", "ce")}
        self.ids: dict[str, list[int]] = {k: [] for k in ("text", "label")}
        self.grids: dict[str, list[Tensor]] = {"vit": [], "latent": []}
        self.values: dict[str, list[Tensor]] = {"vit": [], "latent": []}
        self.vit_lens: list[int] = []
        self.timesteps: list[Tensor] = []
        self.positions: list[int] = []
        self.visible: list[Tensor] = []

    def sample(self, items: Sequence[Item]) -> None:
        splits: list[tuple[str, int]] = []
        rope = 0
        for item in items:
            if isinstance(item, TextItem | TokenItem):
                count = self._text(item, rope)
                splits.append(("causal", count))
                rope += count
            elif isinstance(item, DroppedImage):
                rope += 1
            else:
                count = self._image(item, rope)
                noised = isinstance(item, LatentItem) and item.timestep is not None
                splits.append(("noise" if noised else "full", count))
                rope += 0 if noised else 1
        self.visible.append(visibility(splits))

    def _text(self, item: TextItem | TokenItem, rope: int) -> int:
        ids = list(item.ids) if isinstance(item, TokenItem) else self.text.turn(item.text)
        row = len(self.positions)
        self._tokens(ids, list(range(rope, rope + len(ids))))
        if item.loss:
            self.rows["ce"] += range(row, row + len(ids) - 1)
            self.ids["label"] += ids[1:]
        return len(ids)

    def _image(self, item: ViTItem | LatentItem, rope: int) -> int:
        kind = "vit" if isinstance(item, ViTItem) else "latent"
        tensor = item.image if isinstance(item, ViTItem) else item.latent
        cell = self.config.vit.patch_size if kind == "vit" else self.config.latent_patch_size
        side = self.config.vit_max_patches if kind == "vit" else self.config.max_latent_size
        grid = grid_ids(tensor.shape[1] // cell, tensor.shape[2] // cell, side, self.config.interpolate_pos)
        self._tokens([self.text.image_start], [rope])
        rows = range(len(self.positions), len(self.positions) + len(grid))
        self.positions += [rope] * len(grid)
        self._tokens([self.text.image_end], [rope])
        self.rows[kind] += rows
        self.values[kind].append(patchify(tensor, cell))
        self.grids[kind].append(grid)
        if isinstance(item, ViTItem):
            self.vit_lens.append(len(grid))
        else:
            self.timesteps.append(torch.full((len(grid),), -torch.inf if item.timestep is None else item.timestep))
            self.rows["mse"] += [] if item.timestep is None else rows
        return len(grid) + 2

    def _tokens(self, ids: list[int], positions: list[int]) -> None:
        self.rows["text"] += range(len(self.positions), len(self.positions) + len(ids))
        self.ids["text"] += ids
        self.positions += positions


def pack(model: Bagel, text: TextCodec, samples: Sequence[Sequence[Item]]) -> PackedBatch:
    """Lays samples out on one axis, in the model's configuration. CPU tensors."""
    packer = _Packer(model, text)
    for items in samples:
        packer.sample(items)
    rows = {kind: torch.tensor(r, dtype=torch.int64) for kind, r in packer.rows.items()}
    patch_values = model.config.vit.num_channels * model.config.vit.patch_size**2
    return PackedBatch(
        sample_lens=[len(v) for v in packer.visible],
        visible=packer.visible,
        positions=torch.tensor(packer.positions),
        text_ids=torch.tensor(packer.ids["text"]),
        text_rows=rows["text"],
        vit_patches=_cat(packer.values["vit"], torch.zeros(0, patch_values)),
        vit_ids=_cat(packer.grids["vit"], rows["vit"]),
        vit_rows=rows["vit"],
        vit_lens=packer.vit_lens,
        latents=_cat(packer.values["latent"], torch.zeros(0, model.config.latent_width)),
        latent_ids=_cat(packer.grids["latent"], rows["latent"]),
        latent_rows=rows["latent"],
        timesteps=_cat(packer.timesteps, torch.zeros(0)),
        mse_rows=rows["mse"],
        ce_rows=rows["ce"],
        labels=torch.tensor(packer.ids["label"], dtype=torch.int64),
    )


def visibility(splits: Sequence[tuple[str, int]]) -> Tensor:
    """[len, len] bool of one sample from its (kind, length) splits; kinds are causal, full and noise."""
    split_of = torch.cat([torch.full((n,), i) for i, (_, n) in enumerate(splits)])
    kinds = [kind for kind, _ in splits]
    bidirectional = torch.tensor([kind != "causal" for kind in kinds])[split_of]
    noised = torch.tensor([kind == "noise" for kind in kinds])[split_of]
    row = torch.arange(len(split_of))
    same = split_of[:, None] == split_of[None, :]
    seen = (row[None, :] <= row[:, None]) | (same & bidirectional[:, None])
    return seen & (same | ~noised[None, :])


def _cat(parts: list[Tensor], empty: Tensor) -> Tensor:
    return torch.cat(parts) if parts else empty
