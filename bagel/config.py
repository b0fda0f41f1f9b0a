"""Configuration of a BAGEL model, as frozen dataclasses.

`BagelConfig.from_mappings` is the only reader of the official files, and the only place that corrects what they leave
out or get wrong: the ViT layer count is one too high in `vit_config.json`, and latent sizes, table sizes and VAE widths
are hard-coded upstream. Here they are read off the tensor shapes, so that any checkpoint of the architecture loads
without patches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel.errors import BagelError, shown
from bagel.json_file import read_object
from bagel.layout import ModelSizes

Shapes = Mapping[str, tuple[int, ...]]

LLM_FILE, VIT_FILE, EXTRA_FILE = "llm_config.json", "vit_config.json", "config.json"
LATENT_INPUT, LATENT_TABLE, VIT_TABLE = "vae2llm.weight", "latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"
# Sizes from a file are bounded: tensor names are made from them before they are compared with the stored tensors.
MOST, MOST_LAYERS, LARGEST = 1 << 24, 1000, 1e30
VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159  # of FLUX's autoencoder
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
    default_size: int | None = None  # side of a square picture; `default_image_size` of config.json, our convention

    @property
    def latent_width(self) -> int:
        """Values of one latent token."""
        return self.latent_patch_size**2 * self.latent_channels

    @property
    def image_stride(self) -> int:
        """Pixels of an image side per latent token."""
        return self.vae_downsample * self.latent_patch_size

    def check_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size (height, width in pixels). Raises BagelError on one that the model cannot draw."""
        stride, side = self.image_stride, self.max_latent_size
        for name, pixels in zip(("height", "width"), size, strict=True):
            if pixels <= 0 or pixels % stride:
                raise BagelError(f"image {name} is {pixels}, expected a positive multiple of {stride}.")
            if pixels > side * stride:
                raise BagelError(
                    f"image {name} is {pixels}, expected at most {side * stride} (the latent table's size)."
                )
        return size

    @property
    def usual_size(self) -> tuple[int, int]:
        """The size (height, width) of a picture where none is asked for: the model's own, else the largest square."""
        side = min(1024, self.max_latent_size * self.image_stride)
        return (side, side) if self.default_size is None else (self.default_size, self.default_size)

    @property
    def sizes(self) -> ModelSizes:
        """The numbers that fix the shapes of all tensors."""
        llm, vit = self.llm, self.vit
        return ModelSizes(
            llm.hidden_size, llm.intermediate_size, llm.num_layers, llm.num_heads, llm.num_kv_heads, llm.vocab_size,
            vit.hidden_size, vit.intermediate_size, vit.num_layers, vit.patch_size**2 * vit.num_channels,
            self.latent_width, self.max_latent_size**2, self.vit_max_patches**2,
        )  # fmt: skip

    @classmethod
    def from_dir(cls, folder: Path, shapes: Shapes, latent_channels: int, vae_downsample: int) -> BagelConfig:
        """Reads `llm_config.json`, `vit_config.json` and, if present, `config.json`; corrects them by tensor shapes.

        Raises BagelError if a file or a tensor that decides a size is missing, if a file holds no JSON object, or where
        `from_mappings` raises it.
        """
        files = config_files(folder)
        for name in (LATENT_INPUT, LATENT_TABLE, VIT_TABLE):
            _shape(shapes, name, 2)
        llm, vit = (read_json(files.get(name, folder / name)) for name in (LLM_FILE, VIT_FILE))
        extra = read_json(files[EXTRA_FILE]) if EXTRA_FILE in files else {}
        return cls.from_mappings(llm, vit, extra, shapes, latent_channels, vae_downsample, files)

    @classmethod
    def from_mappings(
        cls,
        llm: Mapping[str, Any],
        vit: Mapping[str, Any],
        extra: Mapping[str, Any],
        shapes: Shapes,
        latent_channels: int = 16,
        vae_downsample: int = 8,
        files: Mapping[str, Path] | None = None,
    ) -> BagelConfig:
        """From the contents of `llm_config.json`, `vit_config.json` and `config.json` (empty if there is none).

        `shapes` are those of the tensors there are, by official name, none for a model without weights. Where a
        tensor that decides a size is missing, it is `config.json`'s, or else the released model's.
        `latent_channels` and `vae_downsample`
        are the VAE's; their defaults are the released one's. `files` says where the three lie, for errors.
        Raises BagelError if a value is missing, null or mistyped, or if a tensor that decides a size is misshapen.
        """
        where = {name: (files or {}).get(name, Path(name)) for name in (LLM_FILE, VIT_FILE, EXTRA_FILE)}
        config = where[EXTRA_FILE]
        patch = _int(extra, "latent_patch_size", config, 2)
        latent_side = _int(extra, "max_latent_size", config, 64)
        vit_side = _int(extra, "vit_max_num_patch_per_side", config, 70)
        if LATENT_INPUT in shapes:
            patch = _latent_patch(shapes, latent_channels)
        if LATENT_TABLE in shapes:
            latent_side = _table_side(shapes, LATENT_TABLE)
        if VIT_TABLE in shapes:
            vit_side = _table_side(shapes, VIT_TABLE)
        default = _int(extra, "default_image_size", config, 1) if "default_image_size" in extra else None
        vae_factors(extra, config)
        made = cls(
            default_size=default,
            llm=_llm(llm, where[LLM_FILE]),
            vit=_vit(vit, where[VIT_FILE], shapes),
            latent_patch_size=patch,
            latent_channels=latent_channels,
            max_latent_size=latent_side,
            vit_max_patches=vit_side,
            interpolate_pos=_bool(extra, "interpolate_pos", config, False),
            timestep_shift=number(extra, "timestep_shift", config, 1.0),
            vae_downsample=vae_downsample,
            vae_rule=_rule(extra, "vae_transform", config, ResizeRule(*_OFFICIAL_VAE_SIDES)),
            vit_rule=_rule(extra, "vit_transform", config, ResizeRule(*_OFFICIAL_VIT_SIDES)),
        )
        if default is not None:
            made.check_size((default, default))
        return made


def vae_factors(extra: Mapping[str, Any], file: Path) -> tuple[float, float]:
    """Scale and shift of latents, from `vae_config` of config.json if it has one, else FLUX's."""
    stored = section(extra, "vae_config", file)
    scale = number(stored, "scale_factor", file, VAE_SCALE)
    return scale, number(stored, "shift_factor", file, VAE_SHIFT)


def config_files(folder: Path) -> dict[str, Path]:
    """Paths of those of the three JSON files that the folder has, by file name."""
    return {name: folder / name for name in (LLM_FILE, VIT_FILE, EXTRA_FILE) if (folder / name).exists()}


def _llm(raw: Mapping[str, Any], file: Path) -> LLMConfig:
    heads = _int(raw, "num_attention_heads", file)
    return LLMConfig(
        hidden_size=_int(raw, "hidden_size", file),
        intermediate_size=_int(raw, "intermediate_size", file),
        num_layers=_int(raw, "num_hidden_layers", file, most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=_int(raw, "num_key_value_heads", file, heads),
        vocab_size=_int(raw, "vocab_size", file),
        rms_norm_eps=_positive(raw, "rms_norm_eps", file, 1e-6),
        rope_theta=_positive(raw, "rope_theta", file, 1e6),
    )


def _vit(raw: Mapping[str, Any], file: Path, shapes: Shapes) -> ViTConfig:
    """`num_hidden_layers` counts a last SigLIP block that is not stored, unless the weights have all of them."""
    pattern = re.compile(r"vit_model\.vision_model\.encoder\.layers\.(\d+)\.")
    stored = {int(m[1]) for name in shapes if (m := pattern.match(name))}
    configured = _int(raw, "num_hidden_layers", file, most=MOST_LAYERS)
    return ViTConfig(
        hidden_size=_int(raw, "hidden_size", file),
        intermediate_size=_int(raw, "intermediate_size", file),
        num_layers=configured if len(stored) == configured else configured - 1,
        num_heads=_int(raw, "num_attention_heads", file),
        patch_size=_int(raw, "patch_size", file, 14),
        num_channels=_int(raw, "num_channels", file, 3),
        layer_norm_eps=_positive(raw, "layer_norm_eps", file, 1e-6),
    )


def _rule(extra: Mapping[str, Any], key: str, file: Path, default: ResizeRule) -> ResizeRule:
    """`vae_transform` and `vit_transform` of config.json: our convention for models with other sizes."""
    if key not in extra:
        return default
    raw = {f"{key}.{name}": value for name, value in section(extra, key, file).items()}
    return ResizeRule(
        max_size=_int(raw, f"{key}.max_image_size", file),
        min_size=_int(raw, f"{key}.min_image_size", file),
        stride=_int(raw, f"{key}.image_stride", file),
        max_pixels=_int(raw, f"{key}.max_pixels", file, default.max_pixels),
    )


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises BagelError if it is missing or something else."""
    if not file.exists():
        raise BagelError(
            f"{file.parent} has no {file.name}; copy it from the base model's folder (or name one with --base)."
        )
    return read_object(file)


def section(raw: Mapping[str, Any], key: str, file: Path) -> Mapping[str, Any]:
    """A nested JSON object; empty if the key is missing. Raises BagelError if it is something else."""
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise _mistyped(file, key, value, "a JSON object")
    return value


def number(raw: Mapping[str, Any], key: str, file: Path, default: float) -> float:
    """A finite number, `default` if the key is missing. Raises BagelError if it is something else."""
    value = raw.get(key, default)
    if type(value) not in (int, float) or not abs(value) < LARGEST:  # NaN compares as false
        raise _mistyped(file, key, value, "a number")
    return float(value)


def _positive(raw: Mapping[str, Any], key: str, file: Path, default: float) -> float:
    value = number(raw, key, file, default)
    if value <= 0:
        raise _mistyped(file, key, value, "a positive number")
    return value


def _int(raw: Mapping[str, Any], key: str, file: Path, default: int | None = None, most: int = MOST) -> int:
    value = raw.get(key, default)
    if type(value) is not int or not 0 < value < most:
        raise _mistyped(file, key, value, f"a positive integer below {most}")
    return value


def _bool(raw: Mapping[str, Any], key: str, file: Path, default: bool) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise _mistyped(file, key, value, "true or false")
    return value


def _mistyped(file: Path, key: str, value: object, expected: str) -> BagelError:
    return BagelError(f"{file}: {key} is {shown(value)}, expected {expected}; copy the file again from the base model.")


def _latent_patch(shapes: Shapes, channels: int) -> int:
    width = _shape(shapes, LATENT_INPUT, 2)[1]
    patch = math.isqrt(width // channels) if channels > 0 else 0
    if patch * patch * channels != width:
        raise BagelError(
            f"vae2llm.weight takes {width} values per latent token, expected a square number of cells"
            f" times the VAE's {channels} channels; model and VAE do not belong together."
        )
    return patch


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
