"""A model of fake tensors, which have shapes and dtypes but no values, for memory predictions.

The tensors are fake tensors on device `cpu`, not `meta`: shapes, dtypes and temporaries are then those of a real run
(on `meta`, attention takes another path that needs five times the memory). Every linear is the codec's run-time module
over fake codes, so temporaries of decoding are counted where they arise; a codec that cannot decode fake codes supplies
a stand-in (`fake_linears`). Of layers that are stored in the same way only a few are made, and counted several times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from bagel.config import BagelConfig
from bagel.layout import official_role
from bagel.loading import parameter_path, put, read_config, shapes_of, tensor_names
from bagel.model import Bagel
from bagel.sampler import FlowSettings, Sampler
from bagel.text import TextCodec
from bagel.vae import AutoEncoder, VAEConfig
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.plan import Plan
from bagel_compress.codecs.base import TORCH_DTYPES, Codec, Unit
from bagel_compress.codecs.ring_size import ring_weights
from bagel_compress.errors import TargetError
from bagel_compress.io.packaged import FULL_CONFIGS
from bagel_compress.io.tensor_spec import PartSpec
from bagel_compress.run.load import runs_coded

LETTERS_PER_TOKEN = 4  # of FakeText
LAYERS_PER_KIND = 2  # layers that are made of each group of layers stored alike
OFFICIAL_VAE = VAEConfig(128, (1, 2, 4, 4), 2, 16)  # of the released ae.safetensors


@dataclass(frozen=True, slots=True)
class UnitOutline:
    """A unit: its specs, its codec, and dtype and shape of its stored parts."""

    unit: Unit
    codec: Codec
    parts: Mapping[str, PartSpec]

    @property
    def runs_coded(self) -> bool:
        """Whether the unit's linears compute from the stored parts. Other units are decoded when they are loaded."""
        return runs_coded(self.codec, self.unit)

    @property
    def stays_coded(self) -> bool:
        """Whether the unit stays in its stored form: its linears run coded, or it is an embedding table read coded."""
        kinds = [official_role(spec.name).kind for spec in self.unit.specs]
        return self.runs_coded or (kinds == ["embedding"] and self.codec.fake_embedding(self.unit, {}) is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored parts."""
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True, slots=True)
class BuildOutline:
    """The inputs of a memory prediction, from an artifact or a plan: configs and the shapes of stored parts."""

    name: str
    digest: str
    config: BagelConfig
    vae: VAEConfig
    units: tuple[UnitOutline, ...]
    disk: int  # bytes of the weight files and the VAE

    @classmethod
    def of_artifact(cls, artifact: Artifact) -> BuildOutline:
        """The outline of an artifact, with the exact sizes of its manifest."""
        units = _unit_outlines(artifact)
        shapes = {s.name: s.shape for stored in units for s in stored.unit.specs}
        vae_shapes = shapes_of(dict.fromkeys(tensor_names(artifact.vae_path), artifact.vae_path))
        config = read_config(artifact.path, shapes, vae_shapes)
        disk = sum(entry.bytes for entry in artifact.manifest.files.values())
        return cls(
            artifact.manifest.recipe.name, artifact.digest, config, VAEConfig.from_shapes(vae_shapes), units, disk
        )

    @classmethod
    def of_manifest(cls, artifact: Artifact) -> BuildOutline:
        """The outline of a build of the released model of which only the manifest was downloaded."""
        units = _unit_outlines(artifact)
        shapes = {s.name: s.shape for stored in units for s in stored.unit.specs}
        config = BagelConfig.from_dir(FULL_CONFIGS, shapes, OFFICIAL_VAE.z_channels, OFFICIAL_VAE.downsample)
        disk = sum(entry.bytes for entry in artifact.manifest.files.values())
        return cls(artifact.manifest.recipe.name, artifact.digest, config, OFFICIAL_VAE, units, disk)

    @classmethod
    def of_plan(cls, plan: Plan, folder: Path = FULL_CONFIGS, vae: VAEConfig = OFFICIAL_VAE) -> BuildOutline:
        """The outline of a plan, from headers alone.

        If a format's size depends on the values, its size for typical weights is used (`Codec.likely_parts`).
        """
        units = tuple(UnitOutline(p.unit, p.codec, p.codec.likely_parts(p.unit)) for p in plan.placements)
        shapes = {s.name: s.shape for stored in units for s in stored.unit.specs}
        config = BagelConfig.from_dir(folder, shapes, vae.z_channels, vae.downsample)
        with torch.device("meta"):
            vae_bytes = sum(p.nbytes for p in AutoEncoder(vae).parameters())
        disk = sum(stored.nbytes for stored in units) + vae_bytes
        return cls(plan.recipe.name, plan.digest, config, vae, units, disk)


def _unit_outlines(artifact: Artifact) -> tuple[UnitOutline, ...]:
    """The units of an artifact, from its manifest."""
    return tuple(
        UnitOutline(artifact.unit(name), entry.codec, {part: stored.spec for part, stored in entry.parts.items()})
        for name, entry in artifact.manifest.units.items()
    )


@dataclass(frozen=True, slots=True)
class FakeModel:
    """A sampler over fake weights, with a few layers of each kind."""

    sampler: Sampler
    times: Mapping[str, int]  # path of a layer -> number of real layers that it stands for
    cache_scale: float  # layers of the real decoder per layer of this model
    ring: Tensor | None  # scratch memory that the codecs' modules share; holds no weights


def fake_model(build: BuildOutline, every_layer: bool = False) -> FakeModel:
    """The fake model of a build. Call it, and use the result, inside a FakeTensorMode.

    `every_layer` makes all layers instead of a few of each kind.
    """
    size = scratch_bytes(build)
    ring = torch.empty(size, dtype=torch.uint8) if size else None
    if every_layer:
        return FakeModel(fake_sampler(build, ring), {}, 1.0, ring)
    llm, vit = _kinds(build, "llm", build.config.llm.num_layers), _kinds(build, "vit", build.config.vit.num_layers)
    config = replace(
        build.config,
        llm=replace(build.config.llm, num_layers=len(llm)),
        vit=replace(build.config.vit, num_layers=len(vit)),
    )
    units = tuple(kept for stored in build.units if (kept := _renumbered(stored, llm, vit)) is not None)
    times = {f"layers.{i}.": count for i, count in enumerate(llm.values())}
    times |= {f"vit.layers.{i}.": count for i, count in enumerate(vit.values())}
    sampler = fake_sampler(replace(build, config=config, units=units), ring)
    return FakeModel(sampler, times, build.config.llm.num_layers / len(llm), ring)


def _kinds(build: BuildOutline, component: str, layers: int) -> dict[int, int]:
    """Layer to make -> number of layers it stands for: the first two of each kind, and the last layer.

    Two, because the input of the first layer is also the input of the pass and is kept longer; the last, because some
    work is skipped there.
    """
    keys: dict[int, list[str]] = {layer: [] for layer in range(layers)}
    for stored in build.units:
        roles = [official_role(spec.name) for spec in stored.unit.specs]
        if roles[0].component == component and roles[0].layer is not None:
            shapes = [(p.dtype, p.shape) for p in stored.parts.values()]
            keys[roles[0].layer].append(f"{roles} {stored.codec!r} {shapes}".replace(f"layer={roles[0].layer}", ""))
    chosen: dict[str, list[int]] = {}
    count: dict[int, int] = {}
    for layer in range(layers - 1):
        kept = chosen.setdefault("\n".join(keys[layer]), [])
        if len(kept) < LAYERS_PER_KIND:
            kept.append(layer)
        count[kept[-1]] = count.get(kept[-1], 0) + 1
    return dict(sorted(count.items())) | {layers - 1: 1}


def _renumbered(stored: UnitOutline, llm: Mapping[int, int], vit: Mapping[int, int]) -> UnitOutline | None:
    """The unit under its layer's new number, without the tensors of layers that are not made; None if none is left."""
    specs = tuple(replace(s, name=name) for s in stored.unit.specs if (name := _new_name(s.name, llm, vit)) is not None)
    if not specs:
        return None
    if len(stored.unit.specs) == 1:
        old, new = (name.rpartition(".")[0] for name in (stored.unit.specs[0].name, specs[0].name))
        parts = {name.replace(old, new): part for name, part in stored.parts.items()}
        return UnitOutline(Unit(specs[0].name, specs), stored.codec, parts)
    return UnitOutline(Unit(stored.unit.name, specs), stored.codec, stored.parts)


def _new_name(name: str, llm: Mapping[int, int], vit: Mapping[int, int]) -> str | None:
    role = official_role(name)
    if role.layer is None:
        return name
    kept = list(llm if role.component == "llm" else vit)
    if role.layer not in kept:
        return None
    return name.replace(f".layers.{role.layer}.", f".layers.{kept.index(role.layer)}.")


def fake_sampler(build: BuildOutline, ring: Tensor | None, dtype: torch.dtype = torch.bfloat16) -> Sampler:
    """A sampler over fake weights, with all layers of `build.config`. Call and use it inside a FakeTensorMode.

    `ring` is the uint8 scratch tensor of `scratch_bytes` elements that modules share.
    """
    bagel = Bagel(build.config)
    for path, parameter in list(bagel.named_parameters()):
        put(bagel, path, nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False))
    biases = {
        spec.name.removesuffix("bias") + "weight": torch.empty(spec.shape, dtype=dtype)
        for stored in build.units
        for spec in stored.unit.specs
        if spec.name.endswith(".bias")
    }
    for stored in build.units:
        if not stored.stays_coded:
            continue
        parts = {name: torch.empty(p.shape, dtype=TORCH_DTYPES[p.dtype]()) for name, p in stored.parts.items()}
        if not stored.runs_coded:
            table = stored.codec.fake_embedding(stored.unit, parts)
            assert table is not None
            put(bagel, parameter_path(stored.unit.specs[0].name).removesuffix(".weight"), table)
            continue
        for tensor, module in stored.codec.fake_linears(stored.unit, parts, biases, ring).items():
            put(bagel, parameter_path(tensor).removesuffix(".weight"), module)
    return FakeSampler(bagel.eval(), AutoEncoder(build.vae).eval().requires_grad_(False), FakeText())


class FakeSampler(Sampler):
    """The sampler for fake tensors: times are constants, and a decoded picture is replaced by an empty one."""

    def schedule(self, flow: FlowSettings) -> list[Tensor]:  # type: ignore[override]
        last, shift = flow.num_timesteps - 1, flow.timestep_shift
        points = [1 - index / last for index in range(last + 1)]
        return [torch.tensor(shift * u / (1 + (shift - 1) * u)) for u in points]

    def check(self, what: str, values: Tensor) -> None:
        """Allocates what the real check allocates, without reading values."""
        (abs(values) < torch.inf).all()

    def picture(self, packed: Tensor, grid: tuple[int, int]) -> Image.Image:
        pixels_CHW = self.decode(packed, grid)
        return Image.new("RGB", (pixels_CHW.shape[2], pixels_CHW.shape[1]))


class FakeText(TextCodec):
    """A tokenizer for texts of which only the length matters: every four letters are one token."""

    def __init__(self) -> None:
        super().__init__(Tokenizer(models.BPE()), bos=0, eos=1, image_start=2, image_end=3)

    def turn(self, text: str) -> list[int]:
        return [0] * (2 + len(text) // LETTERS_PER_TOKEN)


def text_of(tokens: int) -> str:
    """A text that FakeText encodes to this many tokens, wrapper tokens included."""
    return "x" * (LETTERS_PER_TOKEN * max(0, tokens - 2))


def scratch_bytes(build: BuildOutline) -> int:
    """Bytes of the ring: scratch memory on the device that the run-time modules of all formats share, in bf16."""
    coded = (stored for stored in build.units if stored.runs_coded)
    return 2 * ring_weights(unit for stored in coded for unit in stored.codec.ring_units([stored.unit]))


def check_sizes(build: BuildOutline, image: tuple[int, int]) -> None:
    """Raises TargetError if the model has no latent positions for pictures of this size (height, width)."""
    stride, side = build.config.image_stride, build.config.max_latent_size
    if any(s <= 0 or s % stride or s > side * stride for s in image):
        raise TargetError(
            f"the target's image is {image[0]} x {image[1]}, this model makes multiples of {stride} up to"
            f" {side * stride}; give the target other sizes."
        )
