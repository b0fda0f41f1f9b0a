"""Bagel: the network and the passes a sampler makes over it.

    prefill_text, prefill_vit, prefill_latent    append a text turn, a ViT image, a clean VAE image to contexts
    next_logits                                  append one token and predict the next
    noisy_block, velocity                        one denoising pass; the input block is shared by the guidance branches

Every pass takes B contexts (one per sample) and packs the samples' rows; rows of the understanding expert come first.
Work whose result nobody reads is skipped (`skip_unused`): the last layer's queries, attention and MLP of rows that only
feed the cache, or of the two wrapper rows of a denoising block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bagel.config import BagelConfig
from bagel.context import Context
from bagel.inputs import grid_ids
from bagel.layers import RMSNorm, attention, linear_dtype, rope_table
from bagel.mot import MoTLayer
from bagel.one_row import Linear
from bagel.vit import MLP, ViT, patchify

# Called with a name and rows in the official order (wrapper, image, wrapper); asking for taps turns all skipping off.
Tap = Callable[[str, Tensor], None]


class TimeEmbedder(nn.Module):
    """Sinusoidal features of t in [0, 1], unscaled, cosines first, 256 wide in fp32; then linear, SiLU, linear."""

    FEATURES = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    @classmethod
    def features(cls, t_B: Tensor) -> Tensor:
        half = cls.FEATURES // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
        angles = t_B[:, None].float() * freqs
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t_B: Tensor) -> Tensor:
        return self.mlp(self.features(t_B).to(linear_dtype(self.mlp[0])))  # type: ignore[no-any-return]


class PositionTable(nn.Module):
    """A stored 2-D sin-cos table: rows are grid cells (row, col), and the first half of the width encodes col."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        on_meta = torch.get_default_device().type == "meta"  # where a checkpoint will fill it: no time for values
        table = torch.empty(side**2, width) if on_meta else sincos_table(side, width)
        self.pos_embed = nn.Parameter(table, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.pos_embed[ids]


def sincos_table(side: int, width: int) -> Tensor:
    """[side², width] fp32; each half holds sines then cosines of position * 10000^(-k/(width/4))."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    col, row = (g.flatten().double() for g in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"))
    halves = [torch.cat([(p[:, None] * omega).sin(), (p[:, None] * omega).cos()], 1) for p in (col, row)]
    return torch.cat(halves, dim=1).float()


@dataclass(frozen=True, slots=True)
class NoisyBlock:
    """The input of one denoising pass, shared by the guidance branches: wrapper rows [2B, D], latent rows [N, D]."""

    wrappers: Tensor
    latents: Tensor
    lens: tuple[int, ...]  # latent tokens per sample

    def repeated(self, count: int) -> NoisyBlock:
        """The same block for `count` sets of contexts."""
        return NoisyBlock(self.wrappers.repeat(count, 1), self.latents.repeat(count, 1), self.lens * count)


@dataclass(frozen=True, slots=True)
class Places:
    """The devices of a model split over several. A layer's cache is on its device; hidden rows move between them."""

    home: torch.device  # embeddings, bridges, norms: where rows enter and leave
    layers: tuple[torch.device, ...]
    vit: torch.device  # with its connector and position table
    head: torch.device


@dataclass(frozen=True, slots=True)
class PackedPass:
    """One packed pass: the understanding rows of all samples, `und_lens[b]` each, then their generation rows."""

    contexts: Sequence[Context]
    und_lens: Sequence[int]
    gen_lens: Sequence[int]
    rope: tuple[Tensor, Tensor]
    causal: bool
    append: bool

    @property
    def n_und(self) -> int:
        return sum(self.und_lens)


class Bagel(nn.Module):
    """The understanding and generation model, without the VAE."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        llm = config.llm
        self.config = config
        self.skip_unused = True
        self.places: Places | None = None  # None: all on one device
        self.embed_tokens = nn.Embedding(llm.vocab_size, llm.hidden_size)
        self.layers = nn.ModuleList(MoTLayer(llm, i) for i in range(llm.num_layers))
        self.norm_und = RMSNorm(llm.hidden_size, llm.rms_norm_eps)
        self.norm_gen = RMSNorm(llm.hidden_size, llm.rms_norm_eps)
        self.lm_head = Linear(llm.hidden_size, llm.vocab_size, bias=False)
        self.vit = ViT(config.vit, config.vit_max_patches)
        self.connector = MLP(config.vit.hidden_size, llm.hidden_size, llm.hidden_size)
        self.vit_pos_embed = PositionTable(config.vit_max_patches, llm.hidden_size)
        self.vae2llm = nn.Linear(config.latent_width, llm.hidden_size)
        self.llm2vae = nn.Linear(llm.hidden_size, config.latent_width)
        self.latent_pos_embed = PositionTable(config.max_latent_size, llm.hidden_size)
        self.time_embedder = TimeEmbedder(llm.hidden_size)

    @property
    def device(self) -> torch.device:
        """The device that takes a pass's input rows, returns its output rows and holds x."""
        return self.norm_und.weight.device if self.places is None else self.places.home

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream and of the caches."""
        return self.norm_und.weight.dtype

    def new_context(self) -> Context:
        """An empty context."""
        devices = (self.device,) * self.config.llm.num_layers if self.places is None else self.places.layers
        return Context(self.config.llm, self.dtype, devices)

    # --- passes that fill contexts ------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill_text(self, contexts: Sequence[Context], ids: Sequence[Sequence[int]], tap: Tap | None = None) -> None:
        """Appends one text turn (already wrapped) to each context: causal, rope advances by the number of tokens."""
        flat = torch.tensor([i for turn in ids for i in turn], device=self.device)
        lens = [len(turn) for turn in ids]
        positions = torch.cat([torch.arange(c.rope, c.rope + n) for c, n in zip(contexts, lens, strict=True)])
        self._cache(self.embed_tokens(flat), contexts, lens, [0] * len(lens), positions, lens, tap, causal=True)

    @torch.no_grad()
    def prefill_vit(
        self, contexts: Sequence[Context], images: Sequence[Tensor], wrap: tuple[int, int], tap: Tap | None = None
    ) -> None:
        """Appends one image as ViT features to each context: [3, H, W] in [-1, 1], sides multiples of the patch.

        All rows share one rope position and see each other; rope advances by 1. `wrap`: ids of the wrapper tokens.
        """
        features_PD, lens = self.image_features(images, tap)
        start_D, end_D = self._wrapper_rows(wrap)
        parts = [[start_D, rows, end_D] for rows in features_PD.split(lens)]
        x_TD = torch.cat([row for part in parts for row in part])
        lens = [n + 2 for n in lens]
        positions = torch.cat([torch.full((n,), c.rope) for c, n in zip(contexts, lens, strict=True)])
        self._cache(x_TD, contexts, lens, [0] * len(lens), positions, [1] * len(lens), tap, causal=False)

    @torch.no_grad()
    def prefill_latent(
        self, contexts: Sequence[Context], latents: Sequence[Tensor], wrap: tuple[int, int], tap: Tap | None = None
    ) -> None:
        """Appends one clean image as VAE latent [z, h, w] to each context (t = 0). Rows see each other; rope + 1."""
        packed = torch.cat([self.pack_latent(latent) for latent in latents])
        sizes = [latent.shape[-2:] for latent in latents]
        patch = self.config.latent_patch_size
        grids = [(h // patch, w // patch) for h, w in sizes]
        if tap:
            tap("packed_latent", packed)
        block = self.noisy_block(packed, torch.zeros(1), grids, wrap, tap)
        count = len(latents)
        positions = self._block_positions(contexts, block.lens)
        x_TD = torch.cat([block.wrappers, block.latents])
        self._cache(x_TD, contexts, [2] * count, list(block.lens), positions, [1] * count, tap, causal=False)

    def image_features(self, images: Sequence[Tensor], tap: Tap | None = None) -> tuple[Tensor, list[int]]:
        """ViT, connector and position rows of packed images: [P, D] and the number of patches of each image."""
        patch, side = self.config.vit.patch_size, self.config.vit_max_patches
        grids = [(i.shape[1] // patch, i.shape[2] // patch) for i in images]
        lens = [rows * cols for rows, cols in grids]
        ids = torch.cat([grid_ids(r, c, side, self.config.interpolate_pos) for r, c in grids])
        device = self.device if self.places is None else self.places.vit
        ids = ids.to(device)
        patches = torch.cat([patchify(i.to(device), patch) for i in images])
        features_PD = self.vit(patches, ids, lens)
        connected_PD, places_PD = self.connector(features_PD), self.vit_pos_embed(ids)
        if tap:
            tap("packed_vit_tokens", patches)
            tap("packed_vit_position_ids", ids)
            tap("vit_patch_embed", self.vit.embed(patches, ids))
            tap("vit_out", features_PD)
            tap("connector_out", connected_PD)
            tap("vit_pos_embed", places_PD)
        return (connected_PD + places_PD).to(self.device), lens

    # --- text ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def next_logits(self, contexts: Sequence[Context], tokens: Sequence[int]) -> Tensor:
        """Appends one token to each context and returns the logits [B, V] of what follows."""
        x_TD = self.embed_tokens(torch.tensor(list(tokens), device=self.device))
        positions = torch.tensor([c.rope for c in contexts])
        ones = [1] * len(contexts)
        for context in contexts:
            context.reserve(1)
        work = PackedPass(contexts, ones, [0] * len(ones), self.rope(positions), causal=True, append=True)
        h_TD = self._run(x_TD, work, first_in_last=0)
        for context in contexts:
            context.advance(1, 1)
        h_TD = self.norm_und(h_TD)
        return self.lm_head(h_TD if self.places is None else h_TD.to(self.places.head))  # type: ignore[no-any-return]

    # --- images -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def noisy_block(
        self,
        packed: Tensor,
        t: Tensor,
        grids: Sequence[tuple[int, int]],
        wrap: tuple[int, int],
        tap: Tap | None = None,
    ) -> NoisyBlock:
        """LM input of packed latent tokens [N, p*p*z] at time t (one value); `grids` are (rows, cols) per sample."""
        ids = self.latent_ids(grids)
        time_1D = self.time_embedder(t.reshape(1).to(self.device))
        projected = self.vae2llm(packed.to(self.device, linear_dtype(self.vae2llm)))
        latents_ND = projected + time_1D + self.latent_pos_embed(ids)
        if tap:
            tap("packed_vae_position_ids", ids)
            tap("time_embed", time_1D)
            tap("vae2llm_out", projected)
        wrappers = self.block_wrappers(wrap, len(grids))
        return NoisyBlock(wrappers, latents_ND.to(self.dtype), tuple(r * c for r, c in grids))

    def latent_ids(self, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Position ids [N] of the latent tokens of pictures of `grids`, (rows, cols) each."""
        side = self.config.max_latent_size
        return torch.cat([grid_ids(r, c, side, self.config.interpolate_pos) for r, c in grids]).to(self.device)

    def block_wrappers(self, wrap: tuple[int, int], count: int) -> Tensor:
        """The wrapper rows of a block of `count` samples, [2 * count, D]."""
        return torch.cat(list(self._wrapper_rows(wrap)) * count)

    @torch.no_grad()
    def velocity(self, block: NoisyBlock, contexts: Sequence[Context], tap: Tap | None = None) -> Tensor:
        """Predicted noise - data of every latent token, [N, p*p*z]. Contexts are read, not changed."""
        count = len(contexts)
        rope = self.block_rope(contexts, block.lens)
        work = PackedPass(contexts, [2] * count, block.lens, rope, causal=False, append=False)
        x_TD = torch.cat([block.wrappers, block.latents])
        if tap:
            tap("seq_in", _official_order(x_TD, work))
        first = 2 * count if self.skip_unused and not tap else 0
        h_TD = self._run(x_TD, work, first, tap)
        return self.llm2vae(self.norm_gen(h_TD[2 * count - first :]))  # type: ignore[no-any-return]

    def pack_latent(self, latent_CHW: Tensor) -> Tensor:
        """[z, h, w] -> [tokens, p*p*z]: row-major cells of p x p, each flattened in (row, column, channel) order."""
        return patchify(latent_CHW, self.config.latent_patch_size)

    def unpack_latent(self, packed: Tensor, rows: int, cols: int) -> Tensor:
        """Inverse of `pack_latent`: [rows*cols, p*p*z] -> [z, rows*p, cols*p]."""
        p, z = self.config.latent_patch_size, self.config.latent_channels
        cells = packed.reshape(rows, cols, p, p, z)
        return torch.einsum("hwpqc->chpwq", cells).reshape(z, rows * p, cols * p)

    # --- the shared core ----------------------------------------------------------------------------------------------

    def _cache(
        self,
        x_TD: Tensor,
        contexts: Sequence[Context],
        und_lens: Sequence[int],
        gen_lens: Sequence[int],
        positions: Tensor,
        rope_steps: Sequence[int],
        tap: Tap | None,
        causal: bool,
    ) -> None:
        counts = [u + g for u, g in zip(und_lens, gen_lens, strict=True)]
        for context, count in zip(contexts, counts, strict=True):
            context.reserve(count)
        work = PackedPass(contexts, und_lens, gen_lens, self.rope(positions), causal, append=True)
        self._run(x_TD, work, x_TD.shape[0] if self.skip_unused and not tap else 0, tap)
        for context, count, step in zip(contexts, counts, rope_steps, strict=True):
            context.advance(count, step)

    def _run(self, x_TD: Tensor, work: PackedPass, first_in_last: int, tap: Tap | None = None) -> Tensor:
        """All decoder layers. In the last one only rows from `first_in_last` on are carried through."""
        in_fp32 = sum(work.gen_lens) > 0
        attend, rope, places = _attend_with(work), work.rope, self.places
        for index, layer in enumerate(self.layers):
            first = first_in_last if index == len(self.layers) - 1 else 0
            if places is not None and x_TD.device != (device := places.layers[index]):
                x_TD, rope = x_TD.to(device), (rope[0].to(device), rope[1].to(device))
            x_TD = layer(x_TD, work.n_und, rope, attend, in_fp32, first)
            if tap:
                tap(f"layer{index}", _official_order(x_TD, work))
        return x_TD if places is None else x_TD.to(places.home)

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        llm = self.config.llm
        return rope_table(positions_T.to(self.device), llm.head_dim, llm.rope_theta, self.dtype)

    def block_rope(self, contexts: Sequence[Context], lens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rows of a denoising block; a sample has one row of each, shown many times."""
        samples = range(len(contexts))
        counts = [(b, 2) for b in samples] + [(b, lens[b]) for b in samples]
        tables_BE = self.rope(torch.tensor([c.rope for c in contexts]))
        if len(contexts) == 1:
            cos, sin = (table.expand(2 + lens[0], -1) for table in tables_BE)
        else:
            cos, sin = (torch.cat([table[b].expand(n, -1) for b, n in counts]) for table in tables_BE)
        return cos, sin

    def _block_positions(self, contexts: Sequence[Context], lens: Sequence[int]) -> Tensor:
        wrappers = [torch.full((2,), c.rope) for c in contexts]
        return torch.cat(wrappers + [torch.full((n,), c.rope) for c, n in zip(contexts, lens, strict=True)])

    def _wrapper_rows(self, wrap: tuple[int, int]) -> tuple[Tensor, Tensor]:
        start_D, end_D = self.embed_tokens(torch.tensor(wrap, device=self.device)).split(1)
        return start_D, end_D


def segments(x: Tensor, work: PackedPass) -> list[Tensor]:
    """Rows of a pass, per sample, in the official order: wrapper, image, wrapper (or plain text)."""
    und = x[: work.n_und].split(list(work.und_lens))
    if not any(work.gen_lens):
        return list(und)
    gen = x[work.n_und :].split(list(work.gen_lens))
    return [torch.cat([u[:1], g, u[1:]]) for u, g in zip(und, gen, strict=True)]


def _official_order(x_TD: Tensor, work: PackedPass) -> Tensor:
    return torch.cat(segments(x_TD, work))


def _attend_with(work: PackedPass) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """Attention of one pass over its contexts' caches and its own rows; writes the caches if the pass appends."""

    def attend(layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        keys, values = [], []
        for context, k, v in zip(work.contexts, segments(k_TKE, work), segments(v_TKE, work), strict=True):
            if work.append:
                context.write(layer, k, v)
                cached_k, cached_v = context.keys_values(layer, extra=k.shape[0])
            else:
                past_k, past_v = context.keys_values(layer)
                cached_k, cached_v = torch.cat([past_k, k]), torch.cat([past_v, v])
            keys.append(cached_k)
            values.append(cached_v)
        if q_THE.shape[0] == 0:
            return q_THE
        return attention_rows(q_THE, keys, values, work)

    return attend


def attention_rows(q_THE: Tensor, keys: list[Tensor], values: list[Tensor], work: PackedPass) -> Tensor:
    """Attention for query rows in packed order: all rows of the pass, or its generation rows only."""
    count, gen_lens = len(work.contexts), list(work.gen_lens)
    if q_THE.shape[0] == sum(gen_lens):
        return attention(q_THE.split(gen_lens), keys, values, causal=False)
    if not any(gen_lens):
        return attention(q_THE.split(list(work.und_lens)), keys, values, work.causal)
    und, gen = q_THE[: work.n_und].split(list(work.und_lens)), q_THE[work.n_und :].split(gen_lens)
    mixed = attention([torch.cat(pair) for pair in zip(und, gen, strict=True)], keys, values, work.causal)
    parts = mixed.split([u + g for u, g in zip(work.und_lens, gen_lens, strict=True)])
    und_out = [p[:u] for p, u in zip(parts, work.und_lens, strict=True)]
    gen_out = [p[u:] for p, u in zip(parts, work.und_lens, strict=True)]
    return torch.cat(und_out + gen_out) if count > 1 else mixed
