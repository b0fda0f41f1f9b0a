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
        for module, component in {
            "connector.fc1": "connector", "connector.fc2": "connector", "vae2llm": "latent", "llm2vae": "latent",
            "time_embedder.mlp.0": "time", "time_embedder.mlp.2": "time",
        }.items()
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
