"""A model without its weights, for memory predictions: fake tensors with the shapes and dtypes that a build would have.

FakeTensorMode on device `cpu`, not meta: the shapes, dtypes and temporaries are those of a real run (on meta, attention
takes another path with five times the memory). Every linear is the codec's own run-time module over fake codes, so its
decoded temporaries are counted where they arise; a codec that cannot decode fake bits has a stand-in (`fake_linears`).
Layers that are stored alike are made once and counted as often as they occur.
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

LETTERS_PER_TOKEN = 4
ALIKE = 2  # layers made of each kind
OFFICIAL_VAE = VAEConfig(128, (1, 2, 4, 4), 2, 16)  # of the released ae.safetensors


@dataclass(frozen=True, slots=True)
class UnitOutline:
    """One unit as it is stored."""

    unit: Unit
    codec: Codec
    parts: Mapping[str, PartSpec]

    @property
    def runs_coded(self) -> bool:
        """Whether its linears run from the stored parts. All other units are decoded when the model is loaded."""
        return runs_coded(self.codec, self.unit)

    @property
    def stays_coded(self) -> bool:
        """The same, or a table whose rows are looked up in the stored parts."""
        kinds = [official_role(spec.name).kind for spec in self.unit.specs]
        return self.runs_coded or (kinds == ["embedding"] and self.codec.fake_embedding(self.unit, {}) is not None)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True, slots=True)
class BuildOutline:
    """What a memory prediction reads from an artifact or from a plan: configs and stored parts, no weights."""

    name: str
    digest: str
    config: BagelConfig
    vae: VAEConfig
    units: tuple[UnitOutline, ...]
    disk: int  # bytes of the weight files and the VAE

    @classmethod
    def of_artifact(cls, artifact: Artifact) -> BuildOutline:
        """The outline of an artifact; sizes are exact, as they are stored."""
        units = _stored(artifact)
        shapes = {s.name: s.shape for stored in units for s in stored.unit.specs}
        vae_shapes = shapes_of(dict.fromkeys(tensor_names(artifact.vae_path), artifact.vae_path))
        config = read_config(artifact.path, shapes, vae_shapes)
        disk = sum(entry.bytes for entry in artifact.manifest.files.values())
        return cls(
            artifact.manifest.recipe.name, artifact.digest, config, VAEConfig.from_shapes(vae_shapes), units, disk
        )

    @classmethod
    def of_manifest(cls, artifact: Artifact) -> BuildOutline:
        """The outline of a build of the released model of which the manifest alone lies here."""
        units = _stored(artifact)
        shapes = {s.name: s.shape for stored in units for s in stored.unit.specs}
        config = BagelConfig.from_dir(FULL_CONFIGS, shapes, OFFICIAL_VAE.z_channels, OFFICIAL_VAE.downsample)
        disk = sum(entry.bytes for entry in artifact.manifest.files.values())
        return cls(artifact.manifest.recipe.name, artifact.digest, config, OFFICIAL_VAE, units, disk)

    @classmethod
    def of_plan(cls, plan: Plan, folder: Path = FULL_CONFIGS, vae: VAEConfig = OFFICIAL_VAE) -> BuildOutline:
        """The outline of a plan, from headers alone.

        A format whose size depends on the data is taken at its size for usual weights (`Codec.likely_parts`).
        """
        units = tuple(UnitOutline(p.unit, p.codec, p.codec.likely_parts(p.unit)) for p in plan.placements)
        shapes = {s.name: s.shape for stored in units for s in stored.unit.specs}
        config = BagelConfig.from_dir(folder, shapes, vae.z_channels, vae.downsample)
        with torch.device("meta"):
            vae_bytes = sum(p.nbytes for p in AutoEncoder(vae).parameters())
        disk = sum(stored.nbytes for stored in units) + vae_bytes
        return cls(plan.recipe.name, plan.digest, config, vae, units, disk)


def _stored(artifact: Artifact) -> tuple[UnitOutline, ...]:
    """The units of an artifact, from its manifest."""
    return tuple(
        UnitOutline(artifact.unit(name), entry.codec, {part: stored.spec for part, stored in entry.parts.items()})
        for name, entry in artifact.manifest.units.items()
    )


@dataclass(frozen=True, slots=True)
class FakeModel:
    """A sampler over fake weights with one layer of each kind. `times`: path of a layer -> how many it stands for."""

    sampler: Sampler
    times: Mapping[str, int]
    cache_scale: float  # layers of the real decoder per layer here
    ring: Tensor | None  # what the codecs' modules share; no weights


def fake_model(build: BuildOutline, every_layer: bool = False) -> FakeModel:
    """The model of a build. Call it inside a FakeTensorMode, and use it there."""
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
    """Layers to make -> how many each stands for: the first two of each kind, and the last.

    Two, because the first layer's input is also the pass's and lives on; the last, because work is skipped there.
    """
    looks: dict[int, list[str]] = {layer: [] for layer in range(layers)}
    for stored in build.units:
        roles = [official_role(spec.name) for spec in stored.unit.specs]
        if roles[0].component == component and roles[0].layer is not None:
            shapes = [(p.dtype, p.shape) for p in stored.parts.values()]
            looks[roles[0].layer].append(f"{roles} {stored.codec!r} {shapes}".replace(f"layer={roles[0].layer}", ""))
    chosen: dict[str, list[int]] = {}
    count: dict[int, int] = {}
    for layer in range(layers - 1):
        kept = chosen.setdefault("\n".join(looks[layer]), [])
        if len(kept) < ALIKE:
            kept.append(layer)
        count[kept[-1]] = count.get(kept[-1], 0) + 1
    return dict(sorted(count.items())) | {layers - 1: 1}


def _renumbered(stored: UnitOutline, llm: Mapping[int, int], vit: Mapping[int, int]) -> UnitOutline | None:
    """The unit under its layer's new number, without tensors of layers that are not made; None if none is left."""
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
    """The sampler over fake weights, layer by layer. Call it inside a FakeTensorMode, and use it there.

    `ring`: the uint8 tensor that modules share, of `scratch_bytes`.
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
    """The sampler where tensors have no values: times are constants, and pictures are decoded but not made."""

    def schedule(self, flow: FlowSettings) -> list[Tensor]:  # type: ignore[override]
        last, shift = flow.num_timesteps - 1, flow.timestep_shift
        points = [1 - index / last for index in range(last + 1)]
        return [torch.tensor(shift * u / (1 + (shift - 1) * u)) for u in points]

    def check(self, what: str, values: Tensor) -> None:
        """Takes the memory of the check alone."""
        (abs(values) < torch.inf).all()

    def picture(self, packed: Tensor, grid: tuple[int, int]) -> Image.Image:
        pixels_CHW = self.decode(packed, grid)
        return Image.new("RGB", (pixels_CHW.shape[2], pixels_CHW.shape[1]))


class FakeText(TextCodec):
    """A tokenizer for texts whose length alone matters: every four letters are one token."""

    def __init__(self) -> None:
        super().__init__(Tokenizer(models.BPE()), bos=0, eos=1, image_start=2, image_end=3)

    def turn(self, text: str) -> list[int]:
        return [0] * (2 + len(text) // LETTERS_PER_TOKEN)


def text_of(tokens: int) -> str:
    """A text that FakeText turns into this many tokens, wrapper tokens included."""
    return "x" * (LETTERS_PER_TOKEN * max(0, tokens - 2))


def scratch_bytes(build: BuildOutline) -> int:
    """Bytes of device memory that run-time modules of all formats share beside what is stored: the ring, in bf16."""
    coded = (stored for stored in build.units if stored.runs_coded)
    return 2 * ring_weights(unit for stored in coded for unit in stored.codec.ring_units([stored.unit]))


def check_sizes(build: BuildOutline, image: tuple[int, int]) -> None:
    """Raises TargetError on an image size that this model has no latent positions for."""
    stride, side = build.config.image_stride, build.config.max_latent_size
    if any(s <= 0 or s % stride or s > side * stride for s in image):
        raise TargetError(
            f"the target's image is {image[0]} x {image[1]}, this model makes multiples of {stride} up to"
            f" {side * stride}; give the target other sizes."
        )
