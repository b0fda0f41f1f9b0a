"""A model of the true shape without its weights: fake tensors on the CPU, stored and computed as the build would be.

FakeTensorMode on device `cpu`, not meta: the shapes, dtypes and temporaries are those of a real run (on meta, attention
takes another path with five times the memory). Every linear is the codec's own run-time module over fake codes, so its
decoded temporaries are counted where they arise. DF11 cannot decode fake bits; its stand-in holds the stored bytes and
the decoder's ring of scratch memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bagel.config import BagelConfig
from bagel.layout import official_role
from bagel.loading import parameter_path, put, read_config, shapes_of, tensor_names
from bagel.model import Bagel
from bagel.sampler import Sampler
from bagel.text import TextCodec
from bagel.vae import AutoEncoder, VAEConfig
from bagel_compress.artifact import Artifact
from bagel_compress.codecs.base import TORCH_DTYPES, Codec, Unit
from bagel_compress.errors import TargetError
from bagel_compress.plan import Plan
from bagel_compress.resources import FULL_CONFIGS
from bagel_compress.spec import PartSpec

DF11_RING_UNITS = 2  # largest units in the decoder's ring (codecs/df11/runtime.py)
DF11_TYPICAL_BITS = 10.9  # per weight; the published BAGEL build has 19.89 GB of 29.21 (users' figure, DFloat11 card)
LETTERS_PER_TOKEN = 4
OFFICIAL_VAE = VAEConfig(128, (1, 2, 4, 4), 2, 16)  # of the released ae.safetensors


@dataclass(frozen=True, slots=True)
class Stored:
    """One unit as it is stored."""

    unit: Unit
    codec: Codec
    parts: Mapping[str, PartSpec]


@dataclass(frozen=True, slots=True)
class Build:
    """What a memory prediction needs to know of an artifact or of a plan."""

    name: str
    digest: str
    config: BagelConfig
    vae: VAEConfig
    units: tuple[Stored, ...]
    disk: int  # bytes of the weight files and the VAE

    @classmethod
    def of_artifact(cls, artifact: Artifact) -> Build:
        """Exact: sizes as they are stored."""
        entries = artifact.manifest.units
        units = tuple(
            Stored(artifact.unit(name), e.codec, {n: p.spec for n, p in e.parts.items()}) for name, e in entries.items()
        )
        shapes = {s.name: s.shape for stored in units for s in stored.unit.specs}
        vae_shapes = shapes_of(dict.fromkeys(tensor_names(artifact.vae_path), artifact.vae_path))
        config = read_config(artifact.path, shapes, vae_shapes)
        disk = sum(entry.bytes for entry in artifact.manifest.files.values())
        return cls(
            artifact.manifest.recipe.name, artifact.digest, config, VAEConfig.from_shapes(vae_shapes), units, disk
        )

    @classmethod
    def of_plan(cls, plan: Plan, folder: Path = FULL_CONFIGS, vae: VAEConfig = OFFICIAL_VAE) -> Build:
        """From headers alone; DF11 at its typical size."""
        units = tuple(Stored(p.unit, p.codec, _likely_parts(p.codec, p.unit)) for p in plan.placements)
        shapes = {s.name: s.shape for stored in units for s in stored.unit.specs}
        config = BagelConfig.from_dir(folder, shapes, vae.z_channels, vae.downsample)
        with torch.device("meta"):
            vae_bytes = sum(p.nbytes for p in AutoEncoder(vae).parameters())
        disk = sum(p.nbytes for stored in units for p in stored.parts.values()) + vae_bytes
        return cls(plan.recipe.name, plan.digest, config, vae, units, disk)


def fake_sampler(build: Build, dtype: torch.dtype = torch.bfloat16) -> Sampler:
    """The sampler over fake weights. Call it inside a FakeTensorMode, and use it there."""
    bagel = Bagel(build.config)
    for path, parameter in list(bagel.named_parameters()):
        put(bagel, path, nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False))
    biases = {
        spec.name.removesuffix("bias") + "weight": torch.empty(spec.shape, dtype=dtype)
        for stored in build.units
        for spec in stored.unit.specs
        if spec.name.endswith(".bias")
    }
    ring = _ring(build.units)
    for stored in build.units:
        if (
            all(official_role(s.name).kind in ("linear", "head") for s in stored.unit.specs)
            and stored.codec.format != "raw"
        ):
            for tensor, module in _linears(stored, biases, ring).items():
                put(bagel, parameter_path(tensor).removesuffix(".weight"), module)
    return Sampler(bagel.eval(), AutoEncoder(build.vae).eval().requires_grad_(False), _FakeText())


class _FakeText(TextCodec):
    """A tokenizer by length alone: four letters are a token."""

    def __init__(self) -> None:
        for name, value in (("bos", 0), ("eos", 1), ("image_start", 2), ("image_end", 3)):
            object.__setattr__(self, name, value)

    def turn(self, text: str) -> list[int]:
        return [0] * (2 + len(text) // LETTERS_PER_TOKEN)


def text_of(tokens: int) -> str:
    """A text that is a turn of so many tokens."""
    return "x" * (LETTERS_PER_TOKEN * max(0, tokens - 2))


def _linears(stored: Stored, biases: Mapping[str, Tensor], ring: Tensor | None) -> dict[str, nn.Module]:
    parts = {name: torch.empty(p.shape, dtype=TORCH_DTYPES[p.dtype]()) for name, p in stored.parts.items()}
    if stored.codec.format == "df11":
        assert ring is not None
        held = list(parts.values())
        return {
            s.name: _Df11(s.shape, biases.get(s.name), ring, held if i == 0 else [])
            for i, s in enumerate(stored.unit.specs)
        }
    return stored.codec.linears(stored.unit, parts, biases)


class _Df11(nn.Module):
    """Holds the stored bytes of its unit (the first of the unit's modules does) and multiplies out of the ring."""

    compute_dtype = torch.bfloat16

    def __init__(self, shape: tuple[int, ...], bias: Tensor | None, ring: Tensor, held: Sequence[Tensor]) -> None:
        super().__init__()
        self._shape, self._ring = shape, ring
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        for i, part in enumerate(held):
            self.register_buffer(f"part{i}", part)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._ring[: self._shape[0] * self._shape[1]].view(self._shape)
        return nn.functional.linear(x, weight, self.bias)


def _ring(units: Sequence[Stored]) -> Tensor | None:
    largest = max((s.unit.numel for s in units if s.codec.format == "df11"), default=0)
    return torch.empty(DF11_RING_UNITS * largest, dtype=torch.bfloat16) if largest else None


def ring_bytes(build: Build) -> int:
    """Bytes of the DF11 decoder's scratch ring; 0 without DF11."""
    largest = max((s.unit.numel for s in build.units if s.codec.format == "df11"), default=0)
    return DF11_RING_UNITS * largest * 2


def _likely_parts(codec: Codec, unit: Unit) -> Mapping[str, PartSpec]:
    if codec.format == "df11":
        return {f"{unit.name}.coded": PartSpec("U8", (round(unit.numel * DF11_TYPICAL_BITS / 8),))}
    return codec.parts(unit)


def check_sizes(build: Build, image: tuple[int, int]) -> None:
    """Raises TargetError on an image size that this model has no latent positions for."""
    stride, side = build.config.image_stride, build.config.max_latent_size
    if any(s <= 0 or s % stride or s > side * stride for s in image):
        raise TargetError(
            f"the target's image is {image[0]} x {image[1]}, this model makes multiples of {stride} up to"
            f" {side * stride}; give the target other sizes."
        )
