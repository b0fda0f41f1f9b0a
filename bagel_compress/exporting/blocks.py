"""The blocks that are exported: torch modules with named inputs and outputs and symbolic axes.

A decoder layer becomes two graphs over one set of weights. `und_layer` reads text and ViT images and decodes text, all
rows through the understanding expert. `gen_layer` reads clean latents and denoises: the wrapper rows through the
understanding expert, the latent rows through the generation expert, joined once for the shared attention and split
again, without gather or scatter. Caches are inputs and outputs: a block never holds state.

The blocks are built of Bagel's modules (on the meta device, without data); their forward passes use operators that ONNX
has a node for: RMSNormalization, RotaryEmbedding, Attention. Matrices are held as [in, out], the layout of ONNX MatMul.

Axes: T rows, W wrapper rows, N latent rows, S cached rows, P patches, D hidden, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.config import BagelConfig, LLMConfig
from bagel.layers import RMSNorm
from bagel.model import PositionTable, TimeEmbedder
from bagel.mot import Expert
from bagel.vae import Attention as VAEAttention
from bagel.vae import AutoEncoder, VAEConfig
from bagel.vit import MLP, ViT

Shape = tuple[int | str, ...]  # a name is a symbolic axis


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a block. `dtype` is "float" (the export's precision), "float32" or "int64".

    Hidden rows and caches, which only pass from block to block, are in the export's precision. Values that the sampler
    makes or reads (patches, rope tables, velocities, logits, pixels) are fp32, so that it needs no half precision.
    """

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class GraphBlock:
    """One graph. Blocks of one `kind` differ only in their weights, so they share a template."""

    name: str
    kind: str
    data: str  # stem of its weight file; und_layer and gen_layer of one decoder layer share a file
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: dict[str, str]  # parameter path in the module -> path in Bagel ("layers.3.und.q_proj.weight") or "vae..."
    build: Callable[[], nn.Module]  # makes the module, on the meta device
    factor: int = 1  # VAE blocks: pixels per latent cell along a side

    @property
    def in_fp32(self) -> bool:
        """Whether the block is computed in fp32 in every export, as the autoencoder is in the reference sampler."""
        return self.kind.startswith("vae_")


class Dense(nn.Linear):
    """x @ weight + bias with the weight as [in, out]."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.t(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def replace_linears(module: nn.Module) -> nn.Module:
    """Replaces every nn.Linear below `module` by a Dense, in place."""
    for name, child in module.named_children():
        setattr(module, name, Dense(child) if isinstance(child, nn.Linear) else replace_linears(child))
    return module


# --- decoder layers ---------------------------------------------------------------------------------------------------


class UndLayer(nn.Module):
    """One decoder layer for a pass whose rows all use the understanding expert."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.und = Expert(config)

    def forward(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, past_k: Tensor, past_v: Tensor, visible_T: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """cos, sin [1, T, E/2]; past_k, past_v [1, K, S, E]; visible_T: of the S + T keys, how many each row sees.

        Returns the rows, and the keys and values [1, K, S + T, E].
        """
        q, k, v = _qkv(self.und, x_TD, cos, sin, in_fp32=False)
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        mask_TS = torch.arange(keys.shape[2], device=x_TD.device)[None, :] < visible_T[:, None]
        o_TD = _attend(q, keys, values, mask_TS)
        return _after_attention(self.und, x_TD, o_TD), keys, values


class GenLayer(nn.Module):
    """One decoder layer for an image block: wrapper rows and latent rows, each row seeing all others and the cache."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.und = Expert(config)
        self.gen = Expert(config)

    def forward(
        self, wrappers_WD: Tensor, latents_ND: Tensor, cos: Tensor, sin: Tensor, past_k: Tensor, past_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All rows share one rope position: cos, sin [1, 1, E/2]. Returns wrapper rows, latent rows, keys, values."""
        q_w, k_w, v_w = _qkv(self.und, wrappers_WD, *_repeated(cos, sin, wrappers_WD), in_fp32=True)
        q_n, k_n, v_n = _qkv(self.gen, latents_ND, *_repeated(cos, sin, latents_ND), in_fp32=True)
        keys, values = torch.cat([past_k, k_w, k_n], 2), torch.cat([past_v, v_w, v_n], 2)
        o_TD = _attend(torch.cat([q_w, q_n], 2), keys, values, None)
        count = wrappers_WD.shape[0]
        wrappers_WD = _after_attention(self.und, wrappers_WD, o_TD[:count])
        return wrappers_WD, _after_attention(self.gen, latents_ND, o_TD[count:]), keys, values


def _qkv(expert: Expert, x_TD: Tensor, cos: Tensor, sin: Tensor, in_fp32: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, heads, T, E]; queries and keys after norm and rope.

    `in_fp32`: norm and rope are computed in fp32, as Bagel does for image blocks.
    """
    h_TD = rms_norm(x_TD, expert.input_layernorm)
    q = _positioned(_heads(expert.q_proj(h_TD), expert.num_heads), expert.q_norm, cos, sin, in_fp32)
    k = _positioned(_heads(expert.k_proj(h_TD), expert.num_kv_heads), expert.k_norm, cos, sin, in_fp32)
    return q, k, _heads(expert.v_proj(h_TD), expert.num_kv_heads)


def _heads(x_TD: Tensor, count: int) -> Tensor:
    return x_TD.unflatten(-1, (count, -1)).transpose(0, 1)[None]


def _positioned(x: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor, in_fp32: bool) -> Tensor:
    dtype = x.dtype
    cos, sin = cos.to(dtype), sin.to(dtype)  # Bagel rounds the tables to the dtype of the rows in both cases
    if in_fp32:
        x, cos, sin = x.float(), cos.float(), sin.float()
    return torch.onnx.ops.rotary_embedding(rms_norm(x, norm), cos, sin).to(dtype)  # type: ignore[no-any-return]


def _repeated(cos: Tensor, sin: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return cos.expand(1, rows.shape[0], -1), sin.expand(1, rows.shape[0], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1).flatten(1)


def _after_attention(expert: Expert, x_TD: Tensor, o_TD: Tensor) -> Tensor:
    h_TD = x_TD + expert.o_proj(o_TD)
    return h_TD + expert.mlp(rms_norm(h_TD, expert.post_attention_layernorm))


def rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """Bagel's RMSNorm as a single operator, which the exporter maps to one RMSNormalization node."""
    return F.rms_norm(x, (norm.weight.shape[0],), norm.weight.to(x.dtype), norm.eps)


# --- embeddings, heads, ViT and VAE -----------------------------------------------------------------------------------


class Embed(nn.Module):
    """Token ids to rows."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, ids_T: Tensor) -> Tensor:
        return self.embed_tokens(ids_T)  # type: ignore[no-any-return]


class Head(nn.Module):
    """Final norm and lm_head: rows of the understanding expert to logits, widened to fp32."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.norm_und = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.lm_head(rms_norm(x_TD, self.norm_und)).float()  # type: ignore[no-any-return]


class LatentIn(nn.Module):
    """Packed latents at time t to rows: projection + time embedding + position row."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        width = config.llm.hidden_size
        self.vae2llm = nn.Linear(config.latent_width, width)
        self.latent_pos_embed = PositionTable(config.max_latent_size, width)
        self.time_embedder = TimeEmbedder(width)

    def forward(self, latents_NC: Tensor, t_1: Tensor, ids_N: Tensor) -> Tensor:
        """latents_NC and t_1 in fp32, the dtype that the sampler keeps them in."""
        dtype = self.latent_pos_embed.pos_embed.dtype
        time_1D = self.time_embedder.mlp(TimeEmbedder.features(t_1).to(dtype))
        return self.vae2llm(latents_NC.to(dtype)) + time_1D + self.latent_pos_embed(ids_N)  # type: ignore[no-any-return]


class LatentOut(nn.Module):
    """Final norm and llm2vae: latent rows to velocities, widened to fp32."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.norm_gen = RMSNorm(config.llm.hidden_size, config.llm.rms_norm_eps)
        self.llm2vae = nn.Linear(config.llm.hidden_size, config.latent_width)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.llm2vae(rms_norm(x_ND, self.norm_gen)).float()  # type: ignore[no-any-return]


class VitRows(nn.Module):
    """Patches of one image to the rows of its block: ViT, connector and position rows, between the two wrapper rows."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        width = config.llm.hidden_size
        self.vit = ViT(config.vit, config.vit_max_patches)
        self.connector = MLP(config.vit.hidden_size, width, width)
        self.vit_pos_embed = PositionTable(config.vit_max_patches, width)

    def forward(self, patches_PC: Tensor, ids_P: Tensor, wrappers_2D: Tensor) -> Tensor:
        features_PD = self.vit(patches_PC, ids_P, [patches_PC.shape[0]])
        rows_PD = self.connector(features_PD) + self.vit_pos_embed(ids_P)
        return torch.cat([wrappers_2D[:1], rows_PD, wrappers_2D[1:]])


class VaeEncode(nn.Module):
    """Image in [-1, 1] and noise to the sampled, scaled latent."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.vae = _plain_attention(AutoEncoder(config))
        del self.vae.decoder

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        return self.vae.encode(image, noise)


class VaeDecode(nn.Module):
    """Scaled latent to image, nominal range [-1, 1]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.vae = _plain_attention(AutoEncoder(config))
        del self.vae.encoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent)


class _SoftmaxAttention(VAEAttention):
    """The autoencoder's attention in plain operators: TensorRT has no fp32 kernel for the Attention node."""

    def forward(self, x_BChw: Tensor) -> Tensor:
        normed = self.norm(x_BChw)
        q, k, v = (conv(normed).flatten(2) for conv in (self.q, self.k, self.v))
        weights = torch.softmax((q.transpose(1, 2) @ k) * q.shape[1] ** -0.5, dim=-1)
        return x_BChw + self.proj_out((v @ weights.transpose(1, 2)).reshape(x_BChw.shape))  # type: ignore[no-any-return]


def _plain_attention(vae: AutoEncoder) -> AutoEncoder:
    for coder in (vae.encoder, vae.decoder):
        coder.mid.attn_1.__class__ = _SoftmaxAttention
    return vae


# --- the list of all blocks -------------------------------------------------------------------------------------------


def all_blocks(config: BagelConfig, vae: VAEConfig) -> Iterator[GraphBlock]:
    """Every block of a model, in the order in which a run uses them first."""
    yield from _ends(config)
    for index in range(config.llm.num_layers):
        yield _und_layer(config.llm, index)
        yield _gen_layer(config.llm, index)
    yield from _vae(vae)


def _und_layer(llm: LLMConfig, index: int) -> GraphBlock:
    past, present = _cache(llm, "past", "past_tokens"), _cache(llm, "present", "all_tokens")
    half = llm.head_dim // 2
    inputs = (
        Port("x", "float", ("tokens", llm.hidden_size)), Port("cos", "float32", (1, "tokens", half)),
        Port("sin", "float32", (1, "tokens", half)), *past, Port("visible", "int64", ("tokens",)),
    )  # fmt: skip
    outputs = (Port("y", "float", ("tokens", llm.hidden_size)), *present)
    return _block(f"und_layer_{index:02}", "und_layer", f"layer_{index:02}", inputs, outputs, f"layers.{index}.",
                  lambda: UndLayer(llm))  # fmt: skip


def _gen_layer(llm: LLMConfig, index: int) -> GraphBlock:
    past, present = _cache(llm, "past", "past_tokens"), _cache(llm, "present", "all_tokens")
    half, width = llm.head_dim // 2, llm.hidden_size
    inputs = (
        Port("wrappers", "float", ("wrapper_tokens", width)), Port("latents", "float", ("latent_tokens", width)),
        Port("cos", "float32", (1, 1, half)), Port("sin", "float32", (1, 1, half)), *past,
    )  # fmt: skip
    outputs = (
        Port("wrappers_out", "float", ("wrapper_tokens", width)),
        Port("latents_out", "float", ("latent_tokens", width)), *present,
    )  # fmt: skip
    return _block(f"gen_layer_{index:02}", "gen_layer", f"layer_{index:02}", inputs, outputs, f"layers.{index}.",
                  lambda: GenLayer(llm))  # fmt: skip


def _cache(llm: LLMConfig, name: str, axis: str) -> tuple[Port, Port]:
    shape = (1, llm.num_kv_heads, axis, llm.head_dim)
    return Port(f"{name}_k", "float", shape), Port(f"{name}_v", "float", shape)


def _ends(config: BagelConfig) -> Iterator[GraphBlock]:
    llm, width = config.llm, config.llm.hidden_size
    rows, latent_rows = Port("x", "float", ("tokens", width)), Port("x", "float", ("latent_tokens", width))
    patch = config.vit.num_channels * config.vit.patch_size**2
    yield _end("embed", (Port("ids", "int64", ("tokens",)),), rows, lambda: Embed(llm))
    patches = (Port("patches", "float32", ("patches", patch)), Port("ids", "int64", ("patches",)))
    wrapped = (*patches, Port("wrappers", "float", (2, width)))
    yield _end("vit", wrapped, Port("x", "float", ("block_tokens", width)), lambda: VitRows(config))
    packed = Port("latents", "float32", ("latent_tokens", config.latent_width))
    timed = (packed, Port("t", "float32", (1,)), Port("ids", "int64", ("latent_tokens",)))
    yield _end("latent_in", timed, latent_rows, lambda: LatentIn(config))
    velocity = Port("velocity", "float32", ("latent_tokens", config.latent_width))
    yield _end("latent_out", (latent_rows,), velocity, lambda: LatentOut(config))
    yield _end("lm_head", (rows,), Port("logits", "float32", ("tokens", llm.vocab_size)), lambda: Head(llm))


def _vae(vae: VAEConfig) -> Iterator[GraphBlock]:
    image = Port("image", "float32", (1, vae.in_channels, "height", "width"))
    cells: Shape = (1, vae.z_channels, "latent_height", "latent_width")
    latent = Port("latent", "float32", cells)
    encoder = _end("vae_encoder", (image, Port("noise", "float32", cells)), latent, lambda: VaeEncode(vae))
    yield replace(encoder, factor=vae.downsample)
    yield _end("vae_decoder", (latent,), image, lambda: VaeDecode(vae))


def _end(name: str, inputs: tuple[Port, ...], output: Port, build: Callable[[], nn.Module]) -> GraphBlock:
    return _block(name, name, name, inputs, (output,), "", build)


def _block(
    name: str,
    kind: str,
    data: str,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    prefix: str,
    build: Callable[[], nn.Module],
) -> GraphBlock:
    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return replace_linears(build()).eval().requires_grad_(False)

    weights = {path: prefix + path for path, _ in on_meta().named_parameters()}
    return GraphBlock(name, kind, data, inputs, outputs, weights, on_meta)


def matrices(block: GraphBlock) -> set[str]:
    """Paths of the parameters that the block holds transposed, as [in, out]: the weights of its `Dense` modules."""
    return {f"{name}.weight" for name, m in block.build().named_modules() if isinstance(m, Dense)}
