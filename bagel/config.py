"""Configuration of a BAGEL model, as frozen dataclasses.

`BagelConfig.from_dir` is the only place that corrects what the official files leave out or get wrong: the ViT layer
count is one too high in `vit_config.json`, and latent sizes, table sizes and VAE widths are hard-coded upstream.
Here they are read off the tensor shapes, so that any checkpoint of the architecture loads without patches.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel.errors import BagelError
from bagel.layout import ModelSizes

Shapes = Mapping[str, tuple[int, ...]]

_OFFICIAL_VAE_SIDES, _OFFICIAL_VIT_SIDES = (1024, 512, 16), (980, 224, 14)  # longest, shortest, stride


@dataclass(frozen=True, slots=True)
class LLMConfig:
    """The Qwen2 decoder, of which every layer holds two experts."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True)
class ViTConfig:
    """The SigLIP-NaViT encoder; `num_layers` counts the layers that are kept."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class ResizeRule:
    """How an input image is resized; see `bagel.images.resized`. Sides in pixels."""

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024


@dataclass(frozen=True, slots=True)
class BagelConfig:
    """Everything but the VAE, whose configuration is in `bagel.vae`."""

    llm: LLMConfig
    vit: ViTConfig
    latent_patch_size: int  # latent cells per token side
    latent_channels: int  # channels of the VAE latent
    max_latent_size: int  # side of the latent position table
    vit_max_patches: int  # side of the ViT position tables
    interpolate_pos: bool = False
    timestep_shift: float = 1.0  # training only; the sampler has its own
    vae_downsample: int = 8
    vae_rule: ResizeRule = ResizeRule(*_OFFICIAL_VAE_SIDES)
    vit_rule: ResizeRule = ResizeRule(*_OFFICIAL_VIT_SIDES)

    @property
    def latent_width(self) -> int:
        """Values of one latent token."""
        return self.latent_patch_size**2 * self.latent_channels

    @property
    def image_stride(self) -> int:
        """Pixels of an image side per latent token."""
        return self.vae_downsample * self.latent_patch_size

    @property
    def sizes(self) -> ModelSizes:
        """What fixes the shapes of all tensors."""
        llm, vit = self.llm, self.vit
        return ModelSizes(
            llm.hidden_size, llm.intermediate_size, llm.num_layers, llm.num_heads, llm.num_kv_heads, llm.vocab_size,
            vit.hidden_size, vit.intermediate_size, vit.num_layers, vit.patch_size**2 * vit.num_channels,
            self.latent_width, self.max_latent_size**2, self.vit_max_patches**2,
        )  # fmt: skip

    @classmethod
    def from_dir(cls, folder: Path, shapes: Shapes, latent_channels: int, vae_downsample: int) -> BagelConfig:
        """Reads `llm_config.json`, `vit_config.json` and, if present, `config.json`; corrects them by tensor shapes.

        Raises BagelError if a file or a key is missing, or if a tensor that decides a size is.
        """
        llm = _read(folder, "llm_config.json")
        vit = _read(folder, "vit_config.json")
        extra = _read(folder, "config.json") if (folder / "config.json").exists() else {}
        width = _shape(shapes, "vae2llm.weight", 2)[1]
        patch = math.isqrt(width // latent_channels)
        if patch * patch * latent_channels != width:
            raise BagelError(
                f"{folder}: vae2llm.weight takes {width} values per latent token, expected a square number of cells"
                f" times the VAE's {latent_channels} channels; model and VAE do not belong together."
            )
        return cls(
            llm=_llm(llm, folder),
            vit=_vit(vit, folder, shapes),
            latent_patch_size=patch,
            latent_channels=latent_channels,
            max_latent_size=_table_side(shapes, "latent_pos_embed.pos_embed"),
            vit_max_patches=_table_side(shapes, "vit_pos_embed.pos_embed"),
            interpolate_pos=bool(extra.get("interpolate_pos", False)),
            timestep_shift=float(extra.get("timestep_shift", 1.0)),
            vae_downsample=vae_downsample,
            vae_rule=_rule(extra.get("vae_transform"), ResizeRule(*_OFFICIAL_VAE_SIDES)),
            vit_rule=_rule(extra.get("vit_transform"), ResizeRule(*_OFFICIAL_VIT_SIDES)),
        )


def _llm(raw: Mapping[str, Any], folder: Path) -> LLMConfig:
    heads = _int(raw, "num_attention_heads", folder, "llm_config.json")
    return LLMConfig(
        hidden_size=_int(raw, "hidden_size", folder, "llm_config.json"),
        intermediate_size=_int(raw, "intermediate_size", folder, "llm_config.json"),
        num_layers=_int(raw, "num_hidden_layers", folder, "llm_config.json"),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads", heads)),
        vocab_size=_int(raw, "vocab_size", folder, "llm_config.json"),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(raw.get("rope_theta", 1e6)),
    )


def _vit(raw: Mapping[str, Any], folder: Path, shapes: Shapes) -> ViTConfig:
    pattern = re.compile(r"vit_model\.vision_model\.encoder\.layers\.(\d+)\.")
    kept = {int(m[1]) for name in shapes if (m := pattern.match(name))}
    return ViTConfig(
        hidden_size=_int(raw, "hidden_size", folder, "vit_config.json"),
        intermediate_size=_int(raw, "intermediate_size", folder, "vit_config.json"),
        num_layers=max(kept) + 1 if kept else 0,
        num_heads=_int(raw, "num_attention_heads", folder, "vit_config.json"),
        patch_size=int(raw.get("patch_size", 14)),
        num_channels=int(raw.get("num_channels", 3)),
        layer_norm_eps=float(raw.get("layer_norm_eps", 1e-6)),
    )


def _rule(raw: Mapping[str, int] | None, default: ResizeRule) -> ResizeRule:
    """`vae_transform` and `vit_transform` of config.json: our convention for models with other sizes."""
    if raw is None:
        return default
    return ResizeRule(
        raw["max_image_size"], raw["min_image_size"], raw["image_stride"], raw.get("max_pixels", default.max_pixels)
    )


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BagelError(
            f"{folder} has no {name}; copy it from the base model's folder (or name one with --base)."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BagelError(f"{folder / name} is not JSON ({error}); copy it again from the base model.") from None
    if not isinstance(data, dict):
        raise BagelError(f"{folder / name} holds a {type(data).__name__}, expected a JSON object.")
    return data


def _int(raw: Mapping[str, Any], key: str, folder: Path, file: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value <= 0:
        raise BagelError(f"{folder / file}: {key} is {value!r}, expected a positive integer.")
    return value


def _shape(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        raise BagelError(f"the checkpoint has no tensor {name}; it is not a full BAGEL checkpoint.")
    if len(shape) != ndim:
        raise BagelError(f"tensor {name} has shape {list(shape)}, expected {ndim} axes.")
    return shape


def _table_side(shapes: Shapes, name: str) -> int:
    rows = _shape(shapes, name, 2)[0]
    side = math.isqrt(rows)
    if side * side != rows:
        raise BagelError(f"tensor {name} has {rows} rows, expected a square number (one row per grid cell).")
    return side
