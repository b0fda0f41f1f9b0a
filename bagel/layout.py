"""Tensor names of a BAGEL checkpoint: what each one is, and which ones a configuration must have. No torch.

A name is parsed once, here, into a `Role`; everybody else asks the role.
Names and shapes: the released checkpoint, 1223 tensors of `ema.safetensors` and 244 of `ae.safetensors`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Component = Literal["llm", "vit", "connector", "latent", "time", "vae"]
Expert = Literal["und", "gen", "shared"]
Kind = Literal["linear", "conv", "bias", "norm", "embedding", "position", "head"]
Block = Literal["attention", "mlp", "none"]

COMPONENTS: tuple[str, ...] = get_args(Component)
EXPERTS: tuple[str, ...] = get_args(Expert)
KINDS: tuple[str, ...] = get_args(Kind)
BLOCKS: tuple[str, ...] = get_args(Block)


@dataclass(frozen=True, slots=True)
class Role:
    """What a tensor is. `layer` counts decoder layers (llm) or encoder layers (vit); None outside of layers."""

    component: Component
    expert: Expert
    layer: int | None
    kind: Kind
    block: Block = "none"


_LLM_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_VIT_LAYER = re.compile(r"vit_model\.vision_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LLM_MODULE = re.compile(
    r"(self_attn)\.([qkvo]_proj|[qk]_norm)(_moe_gen)?|(mlp|mlp_moe_gen)\.(?:gate|up|down)_proj"
    r"|(?:input|post_attention)_layernorm(_moe_gen)?"
)
_VIT_MODULE = re.compile(r"(self_attn)\.(?:[qkv]|out)_proj|(mlp)\.fc[12]|layer_norm[12]")
_VAE = re.compile(
    r"(?:encoder|decoder)\.(?:conv_in|conv_out|norm_out|(?:down|up)\.\d+\.block\.\d+\.(?:norm|conv)[12]"
    r"|(?:down|up)\.\d+\.block\.\d+\.nin_shortcut|down\.\d+\.downsample\.conv|up\.\d+\.upsample\.conv"
    r"|mid\.block_[12]\.(?:norm|conv)[12]|mid\.attn_1\.(?:norm|q|k|v|proj_out))\.(weight|bias)"
)
_BRIDGES: dict[str, Component] = {
    "connector.fc1": "connector",
    "connector.fc2": "connector",
    "vae2llm": "latent",
    "llm2vae": "latent",
    "time_embedder.mlp.0": "time",
    "time_embedder.mlp.2": "time",
}
_FIXED: dict[str, Role] = {
    "language_model.model.embed_tokens.weight": Role("llm", "shared", None, "embedding"),
    "language_model.lm_head.weight": Role("llm", "shared", None, "head"),
    "language_model.model.norm.weight": Role("llm", "und", None, "norm"),
    "language_model.model.norm_moe_gen.weight": Role("llm", "gen", None, "norm"),
    "vit_model.vision_model.embeddings.patch_embedding.weight": Role("vit", "shared", None, "linear"),
    "vit_model.vision_model.embeddings.patch_embedding.bias": Role("vit", "shared", None, "bias"),
    "vit_model.vision_model.embeddings.position_embedding.weight": Role("vit", "shared", None, "position"),
    "vit_model.vision_model.post_layernorm.weight": Role("vit", "shared", None, "norm"),
    "vit_model.vision_model.post_layernorm.bias": Role("vit", "shared", None, "norm"),
    "vit_pos_embed.pos_embed": Role("connector", "shared", None, "position"),
    "latent_pos_embed.pos_embed": Role("latent", "shared", None, "position"),
    **{
        f"{module}.{part}": Role(component, "shared", None, "linear" if part == "weight" else "bias")
        for module, component in _BRIDGES.items()
        for part in ("weight", "bias")
    },
}  # fmt: skip


def role_of(name: str) -> Role | None:
    """The role of an official tensor name, or None if BAGEL has no such tensor."""
    if name in _FIXED:
        return _FIXED[name]
    if match := _LLM_LAYER.fullmatch(name):
        return _llm_role(int(match[1]), match[2], match[3])
    if match := _VIT_LAYER.fullmatch(name):
        return _vit_role(int(match[1]), match[2], match[3])
    if match := _VAE.fullmatch(name):
        norm = re.search(r"norm[12]|norm_out|attn_1\.norm", name)
        return Role("vae", "shared", None, "norm" if norm else "conv" if match[1] == "weight" else "bias")
    return None


def official_role(name: str) -> Role:
    """The role of a name that is known to be official. Raises KeyError otherwise."""
    role = role_of(name)
    if role is None:
        raise KeyError(name)
    return role


def _llm_role(layer: int, module: str, part: str) -> Role | None:
    match = _LLM_MODULE.fullmatch(module)
    if match is None:
        return None
    expert: Expert = "gen" if "_moe_gen" in module else "und"
    block: Block = "attention" if match[1] else "mlp" if match[4] else "none"
    if "norm" in module:
        return Role("llm", expert, layer, "norm", block)
    return Role("llm", expert, layer, "linear" if part == "weight" else "bias", block)


def _vit_role(layer: int, module: str, part: str) -> Role | None:
    match = _VIT_MODULE.fullmatch(module)
    if match is None:
        return None
    block: Block = "attention" if match[1] else "mlp" if match[2] else "none"
    if "layer_norm" in module:
        return Role("vit", "shared", layer, "norm", block)
    return Role("vit", "shared", layer, "linear" if part == "weight" else "bias", block)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The numbers that fix every tensor shape. `vit_layers` counts the stored ones (one less than SigLIP has)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    vit_hidden: int
    vit_intermediate: int
    vit_layers: int
    vit_patch: int = 588  # values of one patch: 14 x 14 pixels x 3 channels
    latent: int = 64  # values of one latent token: 2 x 2 cells x 16 channels
    latent_rows: int = 4096  # rows of the latent position table, a square
    vit_rows: int = 4900  # rows of both ViT position tables, a square
    frequencies: int = 256  # width of the sinusoidal timestep features


def expected_tensors(sizes: ModelSizes) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the main file (all but the VAE), in the order of the official file (by name)."""
    s = sizes
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (s.vocab, s.hidden),
        "language_model.lm_head.weight": (s.vocab, s.hidden),
        "language_model.model.norm.weight": (s.hidden,),
        "language_model.model.norm_moe_gen.weight": (s.hidden,),
        "latent_pos_embed.pos_embed": (s.latent_rows, s.hidden),
        "vit_pos_embed.pos_embed": (s.vit_rows, s.hidden),
    }
    for module, rows, columns in (
        ("time_embedder.mlp.0", s.hidden, s.frequencies),
        ("time_embedder.mlp.2", s.hidden, s.hidden),
        ("vae2llm", s.hidden, s.latent),
        ("llm2vae", s.latent, s.hidden),
        ("connector.fc1", s.hidden, s.vit_hidden),
        ("connector.fc2", s.hidden, s.hidden),
    ):
        shapes |= {f"{module}.weight": (rows, columns), f"{module}.bias": (rows,)}
    for layer in range(s.layers):
        for suffix in ("", "_moe_gen"):
            shapes |= _llm_layer_tensors(s, f"language_model.model.layers.{layer}.", suffix)
    return dict(sorted((shapes | _vit_tensors(s)).items()))


def _llm_layer_tensors(s: ModelSizes, prefix: str, suffix: str) -> dict[str, tuple[int, ...]]:
    head_dim = s.hidden // s.heads
    shapes: dict[str, tuple[int, ...]] = {}
    for letter, rows in (("q", s.hidden), ("k", s.kv_heads * head_dim), ("v", s.kv_heads * head_dim)):
        shapes[f"{prefix}self_attn.{letter}_proj{suffix}.weight"] = (rows, s.hidden)
        shapes[f"{prefix}self_attn.{letter}_proj{suffix}.bias"] = (rows,)
    shapes[f"{prefix}self_attn.o_proj{suffix}.weight"] = (s.hidden, s.hidden)
    for letter in "qk":
        shapes[f"{prefix}self_attn.{letter}_norm{suffix}.weight"] = (head_dim,)
    for name, shape in (
        ("gate", (s.intermediate, s.hidden)), ("up", (s.intermediate, s.hidden)), ("down", (s.hidden, s.intermediate)),
    ):  # fmt: skip
        shapes[f"{prefix}mlp{suffix}.{name}_proj.weight"] = shape
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{prefix}{name}{suffix}.weight"] = (s.hidden,)
    return shapes


def _vit_tensors(s: ModelSizes) -> dict[str, tuple[int, ...]]:
    root = "vit_model.vision_model."
    linears = {"embeddings.patch_embedding": (s.vit_hidden, s.vit_patch)}
    norms = ["post_layernorm"]
    for layer in range(s.vit_layers):
        at = f"encoder.layers.{layer}."
        linears |= {f"{at}self_attn.{name}_proj": (s.vit_hidden, s.vit_hidden) for name in ("q", "k", "v", "out")}
        linears |= {
            f"{at}mlp.fc1": (s.vit_intermediate, s.vit_hidden),
            f"{at}mlp.fc2": (s.vit_hidden, s.vit_intermediate),
        }
        norms += [f"{at}layer_norm1", f"{at}layer_norm2"]
    shapes: dict[str, tuple[int, ...]] = {f"{root}embeddings.position_embedding.weight": (s.vit_rows, s.vit_hidden)}
    for name, (rows, columns) in linears.items():
        shapes |= {f"{root}{name}.weight": (rows, columns), f"{root}{name}.bias": (rows,)}
    for name in norms:
        shapes |= {f"{root}{name}.weight": (s.vit_hidden,), f"{root}{name}.bias": (s.vit_hidden,)}
    return shapes
