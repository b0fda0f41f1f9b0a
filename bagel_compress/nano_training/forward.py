"""The training forward for many short samples of few layouts: `bagel.training` with batched attention.

Samples with equally many images form a group, whose texts are padded to one length; attention is then one batched
product per group and layer, not one call per sample. Everything else is the model itself: rows of the understanding
expert of all groups come first, then those of the generation expert, as its layers want them.

Two kinds of sharing save most of the work, and change no number: noised copies of a picture share one prompt (the
official visibility rule: they do not see each other), and several questions share one picture (`Branch`: a branch sees
the trunk and itself, and its rope positions go on from the trunk, as if it were a sample of its own).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from bagel.inputs import grid_ids
from bagel.layers import rope_table
from bagel.model import Bagel
from bagel.text import TextCodec
from bagel.training import shifted_times

IGNORE = -100
_CAUSAL, _FULL, _NOISE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class TextTurn:
    """A text turn by its ids (wrapped). `weight`: of its cross entropy; 0 is no loss."""

    ids: Sequence[int]
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class ViTPatches:
    """A picture as ViT patches [P, 588]."""

    patches: Tensor


@dataclass(frozen=True, slots=True)
class Latent:
    """A picture as packed latent [N, p*p*z]: clean (`draw` None), or noised at sigmoid(draw), with loss."""

    values: Tensor
    draw: float | None = None


@dataclass(frozen=True, slots=True)
class Branch:
    """Items that go on from the trunk (the items outside of branches before it), unseen by anything outside."""

    items: tuple[TextTurn, ...]


Item = TextTurn | ViTPatches | Latent | Branch


@dataclass(slots=True)
class SampleGroup:
    """B samples; slots of each: U of the understanding expert (padded texts, then patches), then G latents."""

    text_ids: Tensor  # [B, t]
    labels: Tensor  # [B, t], IGNORE where nothing is predicted
    weights: Tensor  # [B, t]
    patches: Tensor  # [B, images, P, 588]
    latents: Tensor  # [B, pictures, N, p*p*z]
    draws: Tensor  # [B, pictures], -inf is clean
    positions: Tensor  # [B, U + G]
    mask: Tensor  # [B, 1, U + G, U + G], 0 or -inf

    @property
    def size(self) -> int:
        return self.text_ids.shape[0]

    @property
    def n_und(self) -> int:
        """Understanding slots of one sample."""
        return self.text_ids.shape[1] + self.patches.shape[1] * self.patches.shape[2]

    @property
    def n_gen(self) -> int:
        """Generation slots of one sample."""
        return self.latents.shape[1] * self.latents.shape[2]


@dataclass(frozen=True, slots=True)
class WeightedLosses:
    """Unreduced: cross entropies with their weights, squared errors [noised tokens, p*p*z]."""

    ce: Tensor
    ce_weights: Tensor
    mse: Tensor


def forward(model: Bagel, groups: Sequence[SampleGroup], noise: Sequence[Tensor]) -> WeightedLosses:
    """Losses of a batch; `noise[g]` is standard normal in the shape of `groups[g].latents`."""
    llm = model.config.llm
    draws = [shifted_times(g.draws, model.config.timestep_shift) for g in groups]
    x_und = torch.cat([_embed_und(model, g).flatten(0, 1) for g in groups])
    gen = [_embed_gen(model, g, n, t).flatten(0, 1) for g, n, t in zip(groups, noise, draws, strict=True) if g.n_gen]
    x_TD = torch.cat([x_und, *gen])
    n_und = x_und.shape[0]
    positions = [g.positions[:, : g.n_und].flatten() for g in groups] + [
        g.positions[:, g.n_und :].flatten() for g in groups
    ]
    rope = rope_table(torch.cat(positions), llm.head_dim, llm.rope_theta, x_TD.dtype)

    def attend(_: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        return _attention(groups, n_und, q_THE, k_TKE, v_TKE)

    for layer in model.layers:
        x_TD = layer(x_TD, n_und, rope, attend, in_fp32=True)
    return _losses(model, groups, noise, draws, x_TD[:n_und], x_TD[n_und:])


def _embed_und(model: Bagel, group: SampleGroup) -> Tensor:
    x_BUD = model.embed_tokens(group.text_ids)
    batch, images, patches, values = group.patches.shape
    if not images:
        return x_BUD  # type: ignore[no-any-return]
    side = round(patches**0.5)
    ids = grid_ids(side, side, model.config.vit_max_patches).repeat(batch * images)
    features = model.vit(group.patches.reshape(-1, values), ids, [patches] * (batch * images))
    features = model.connector(features) + model.vit_pos_embed(ids)
    return torch.cat([x_BUD, features.reshape(batch, images * patches, -1)], 1)


def _embed_gen(model: Bagel, group: SampleGroup, noise: Tensor, t_BP: Tensor) -> Tensor:
    t = t_BP[..., None, None]
    x_BPNC = (1 - t) * group.latents + t * noise
    side = round(group.latents.shape[2] ** 0.5)
    places = model.latent_pos_embed(grid_ids(side, side, model.config.max_latent_size))
    times = model.time_embedder(t_BP.flatten()).reshape(*t_BP.shape, 1, -1)
    return (model.vae2llm(x_BPNC) + times + places).flatten(1, 2)  # type: ignore[no-any-return]


def _attention(groups: Sequence[SampleGroup], n_und: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Per group one batched attention; rows come and go as understanding rows of all groups, then generation rows."""
    und, gen = [], []
    u, g = 0, n_und
    for group in groups:
        u_next, g_next = u + group.size * group.n_und, g + group.size * group.n_gen

        def rows(
            x: Tensor, a: int = u, b: int = u_next, c: int = g, d: int = g_next, group: SampleGroup = group
        ) -> Tensor:
            parts = [x[a:b].unflatten(0, (group.size, -1))]
            if d > c:
                parts.append(x[c:d].unflatten(0, (group.size, -1)))
            return torch.cat(parts, 1).transpose(1, 2)

        out_BSHE = _masked(rows(q), rows(k), rows(v), group.mask).transpose(1, 2)
        und.append(out_BSHE[:, : group.n_und].flatten(0, 1))
        gen.append(out_BSHE[:, group.n_und :].flatten(0, 1))
        u, g = u_next, g_next
    return torch.cat(und + gen)


def _masked(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor) -> Tensor:
    """Attention by two products over [K, H/K * S] query rows: trains faster on CPU than the fused kernel."""
    batch, heads, length, width = q_BHSE.shape
    kv_heads = k_BKSE.shape[1]
    q = (q_BHSE * width**-0.5).reshape(batch * kv_heads, -1, width)
    k, v = k_BKSE.reshape(batch * kv_heads, length, width), v_BKSE.reshape(batch * kv_heads, length, width)
    scores = (q @ k.mT).view(batch, kv_heads, heads // kv_heads, length, length) + mask[:, :, None]
    return (torch.softmax(scores, -1).view(q.shape[0], -1, length) @ v).view(batch, heads, length, width)


def _losses(
    model: Bagel,
    groups: Sequence[SampleGroup],
    noise: Sequence[Tensor],
    times: Sequence[Tensor],
    und_TD: Tensor,
    gen_TD: Tensor,
) -> WeightedLosses:
    text_rows, labels, weights, gen_rows, targets = [], [], [], [], []
    u = g = 0
    for group, eps, t in zip(groups, noise, times, strict=True):
        predicted = (group.labels != IGNORE).nonzero()
        text_rows.append(u + predicted[:, 0] * group.n_und + predicted[:, 1])
        labels.append(group.labels[predicted[:, 0], predicted[:, 1]])
        weights.append(group.weights[predicted[:, 0], predicted[:, 1]])
        if group.n_gen:
            noised = (t > 0)[..., None].expand(group.latents.shape[:3])
            gen_rows.append(g + noised.flatten().nonzero()[:, 0])
            targets.append((eps - group.latents)[noised])
        u, g = u + group.size * group.n_und, g + group.size * group.n_gen
    logits = model.lm_head(model.norm_und(und_TD[torch.cat(text_rows)]))
    ce = cross_entropy(logits.float(), torch.cat(labels), reduction="none")
    if not gen_rows:
        return WeightedLosses(ce, torch.cat(weights), ce.new_zeros(0, model.config.latent_width))
    velocity = model.llm2vae(model.norm_gen(gen_TD[torch.cat(gen_rows)]))
    return WeightedLosses(ce, torch.cat(weights), (velocity.float() - torch.cat(targets)) ** 2)


# --- layout -----------------------------------------------------------------------------------------------------------


def grouped(
    text: TextCodec, samples: Sequence[Sequence[Item]], latent_tokens: int, latent_width: int
) -> list[SampleGroup]:
    """Lays samples out and groups those with equally many pictures of each kind, long texts apart from short ones."""
    layouts = [_Layout(text, items) for items in samples]
    groups: dict[tuple[int, int, bool], list[_Layout]] = defaultdict(list)
    for layout in layouts:
        groups[len(layout.patches), len(layout.latents), len(layout.text) > 40 and not layout.patches].append(layout)
    return [_group(members, latent_tokens, latent_width) for _, members in sorted(groups.items(), key=lambda g: g[0])]


class _Layout:
    """One sample: per slot (rope position, order, split, branch, kind), for text, patch and latent slots."""

    def __init__(self, text: TextCodec, items: Sequence[Item]) -> None:
        self._wrap = text.image_start, text.image_end
        self.text: list[tuple[int, int, int, int, int]] = []
        self.seen: list[tuple[int, int, int, int, int]] = []
        self.gen: list[tuple[int, int, int, int, int]] = []
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.weights: list[float] = []
        self.patches: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.draws: list[float] = []
        self._order = self._split = self._branches = 0
        rope = 0
        for item in items:
            rope = self._add(item, rope, 0)

    def _add(self, item: Item, rope: int, branch: int) -> int:
        """Lays an item out; returns the next rope position."""
        if isinstance(item, Branch):
            self._branches += 1
            inner, number = rope, self._branches
            for part in item.items:
                inner = self._add(part, inner, number)
            return rope
        self._split += 1
        if isinstance(item, TextTurn):
            return self._add_text(item, rope, branch)
        noised = isinstance(item, Latent) and item.draw is not None
        kind = _NOISE if noised else _FULL
        self._token(self._wrap[0], rope, branch, kind)
        if isinstance(item, ViTPatches):
            self.patches.append(item.patches)
            self.seen += [self._slot(rope, branch, kind) for _ in range(len(item.patches))]
        else:
            self.latents.append(item.values)
            self.draws.append(-np.inf if item.draw is None else item.draw)
            self.gen += [self._slot(rope, branch, kind) for _ in range(len(item.values))]
        self._token(self._wrap[1], rope, branch, kind)
        return rope if noised else rope + 1

    def _add_text(self, item: TextTurn, rope: int, branch: int) -> int:
        for index, token in enumerate(item.ids):
            last = index == len(item.ids) - 1
            label = IGNORE if last or not item.weight else item.ids[index + 1]
            self._token(token, rope + index, branch, _CAUSAL, label, item.weight)
        return rope + len(item.ids)

    def _token(self, token: int, rope: int, branch: int, kind: int, label: int = IGNORE, weight: float = 0.0) -> None:
        self.text.append(self._slot(rope, branch, kind))
        self.ids.append(token)
        self.labels.append(label)
        self.weights.append(weight)

    def _slot(self, rope: int, branch: int, kind: int) -> tuple[int, int, int, int, int]:
        self._order += 1
        return rope, self._order, self._split, branch, kind


def _group(layouts: list[_Layout], latent_tokens: int, latent_width: int) -> SampleGroup:
    length = max(len(layout.text) for layout in layouts)

    def padded(values: Sequence[float], filler: float) -> list[float]:
        return [*values, *[filler] * (length - len(values))]

    pad = (0, 0, 0, 0, -1)  # kind -1: seen by nobody
    slots = np.array([[*x.text, *[pad] * (length - len(x.text)), *x.seen, *x.gen] for x in layouts])
    pictures = len(layouts[0].latents)
    latents = torch.stack([t for x in layouts for t in x.latents]) if pictures else torch.zeros(0)
    patches = torch.stack([t for x in layouts for t in x.patches]) if layouts[0].patches else None
    count = len(layouts)
    return SampleGroup(
        text_ids=torch.tensor([padded(x.ids, 0) for x in layouts]),
        labels=torch.tensor([padded(x.labels, IGNORE) for x in layouts]),
        weights=torch.tensor([padded(x.weights, 0.0) for x in layouts]),
        patches=torch.zeros(count, 0, 0, 0) if patches is None else patches.unflatten(0, (count, -1)),
        latents=latents.reshape(count, pictures, latent_tokens, latent_width),
        draws=torch.tensor([x.draws for x in layouts]).reshape(count, pictures),
        positions=torch.from_numpy(slots[..., 0].copy()),
        mask=attention_mask(slots),
    )


def attention_mask(slots: NDArray[np.int64]) -> Tensor:
    """0 where a query may look, -inf elsewhere: the official rule (`bagel.training.visibility`), branches apart."""
    _, order, split, branch, kind = (slots[..., i] for i in range(5))
    same = split[:, :, None] == split[:, None, :]
    before = order[:, None, :] <= order[:, :, None]
    reach = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    seen = (before & reach) | (same & (kind > _CAUSAL)[:, :, None])
    seen &= (same | (kind != _NOISE)[:, None, :]) & (kind >= 0)[:, None, :]
    seen |= np.eye(slots.shape[1], dtype=bool)  # a padded query sees itself: no row is empty
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf)))[:, None]
