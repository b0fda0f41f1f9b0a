"""manifest.json of an artifact: its source, its recipe, and the digest and error of everything in it."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from bagel.errors import shown
from bagel.layout import role_of
from bagel_compress.build.recipe import Recipe, parse_codec
from bagel_compress.codecs.base import Codec, Rounded
from bagel_compress.errors import ArtifactError
from bagel_compress.io.safe_paths import check_names
from bagel_compress.io.tensor_spec import DTYPE_BYTES, PartSpec
from bagel_compress.io.yaml_model import FrozenModel

if TYPE_CHECKING:
    from bagel_compress.source.adapter import Adapter
    from bagel_compress.source.checkpoint import Base, Checkpoint

MANIFEST = "manifest.json"
EXPORT_MANIFEST = "export.json"  # manifest of an export; see exporting/manifest.py
MANIFESTS = (MANIFEST, EXPORT_MANIFEST)
FORMAT = 1  # version of the manifest's fields


def _known(dtype: str) -> str:
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{shown(dtype)} is no dtype of safetensors")
    return dtype


Dtype = Annotated[str, AfterValidator(_known)]


class StoredPart(FrozenModel):
    """A stored tensor of a shard."""

    dtype: Dtype
    shape: tuple[NonNegativeInt, ...]
    blake3: str

    @property
    def spec(self) -> PartSpec:
        return PartSpec(self.dtype, self.shape)


class TensorEntry(FrozenModel):
    """A tensor of the checkpoint; `blake3` is the digest of its bf16 values."""

    dtype: Dtype
    shape: tuple[PositiveInt, ...]
    blake3: str


class UnitEntry(FrozenModel):
    """One unit: its tensors, its codec, and its stored parts."""

    codec: Annotated[SerializeAsAny[Codec], BeforeValidator(parse_codec)]
    shard: str
    tensors: dict[str, TensorEntry]
    parts: dict[str, StoredPart]
    snr_db: float | None = None  # of the decoded weights; None: lossless
    reason: str = ""  # why the codec is not the recipe's, or another remark of the codec
    rounded: Rounded | None = None  # the effect of calibrated rounding; None (no key) for rounding to nearest

    @model_serializer(mode="wrap")
    def _without_rounded(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.rounded is None:
            del fields["rounded"]
        return fields


class FileEntry(FrozenModel):
    """A file of the folder, with the digest of its bytes or, for a shard, the digest computed from its tensors'."""

    bytes: int
    blake3: str = ""
    blake3_tensors: str = ""  # see `tensors_digest`

    @property
    def digests(self) -> dict[str, str]:
        """Name of the algorithm -> digest; only the one that the entry has."""
        return {"blake3_tensors": self.blake3_tensors} if self.blake3_tensors else {"blake3": self.blake3}


class _Listing(FrozenModel, extra="ignore"):
    """The fields that manifests of artifacts and of exports have in common."""

    files: dict[str, FileEntry]


class AdapterEntry(FrozenModel):
    """An adapter that was merged into the weights; `blake3` is over its config and weight files."""

    name: str
    blake3: str
    scales: tuple[float, float]  # smallest and largest scale of its pairs


class BaseEntry(FrozenModel):
    """A second checkpoint that supplied what the first one lacked: tensors and files, by name."""

    name: str
    revision: str
    files: tuple[str, ...]
    tensors: tuple[str, ...]


class SourceEntry(FrozenModel):
    """The checkpoint that was compressed: its identity, and `data_blake3` over every value that was read.

    `adapter` and `base` name what else contributed to the values. The identity is that of the resulting values.
    """

    name: str
    revision: str
    digest: str
    data_blake3: str
    adapter: AdapterEntry | None = None
    base: BaseEntry | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, digest: str, data_blake3: str) -> SourceEntry:
        """The entry of a checkpoint whose identity is `digest`."""
        merged, base = checkpoint.adapter, checkpoint.base
        return cls(
            name=checkpoint.name,
            revision=checkpoint.revision,
            digest=digest,
            data_blake3=data_blake3,
            adapter=None if merged is None else _adapter_entry(merged),
            base=None if base is None else _base_entry(base),
        )


def _adapter_entry(adapter: Adapter) -> AdapterEntry:
    return AdapterEntry(name=adapter.name, blake3=adapter.digest, scales=adapter.scales)


def _base_entry(base: Base) -> BaseEntry:
    return BaseEntry(name=base.name, revision=base.revision, files=base.files, tensors=base.tensors)


class CalibrationEntry(FrozenModel):
    """The calibration set of the build: sha256 of its file, the checkpoint that made it, and its contents."""

    digest: str
    source: str
    source_digest: str
    latents: str  # sampled by the model, or of given pictures
    rows_und: int
    rows_gen: int


class Manifest(FrozenModel):
    """Everything known about an artifact when it was built."""

    format: int = FORMAT
    tool: str
    plan: str  # digest of the plan
    source: SourceEntry
    recipe: Recipe
    recipe_digest: str
    calibration: CalibrationEntry | None = None
    units: dict[str, UnitEntry]
    files: dict[str, FileEntry]

    @model_serializer(mode="wrap")
    def _without_calibration(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves the key `calibration` out for a build without calibration."""
        fields: dict[str, Any] = handler(self)
        if self.calibration is None:
            del fields["calibration"]
        return fields

    def to_bytes(self) -> bytes:
        """The file's content: deterministic JSON."""
        return self.model_dump_json(indent=1, by_alias=True).encode() + b"\n"

    @cached_property
    def unit_of(self) -> dict[str, str]:
        """Tensor name -> name of the unit that holds it."""
        return {tensor: name for name, unit in self.units.items() for tensor in unit.tensors}

    @property
    def shards(self) -> list[str]:
        return sorted({unit.shard for unit in self.units.values()})


def parse_manifest(content: bytes, folder: Path) -> Manifest:
    """Parses a manifest; `folder` is named in errors. Raises ArtifactError on bad JSON, fields or file names."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        raise ArtifactError(f"{folder / MANIFEST} is not JSON; copy the artifact again.") from None
    if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
        raise ArtifactError(
            f"{folder / MANIFEST} has format {data['format']}, this version reads {FORMAT}; update bagel-compress."
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ArtifactError(
            f"{folder / MANIFEST} is damaged at {where} ({fault['msg']}); copy the artifact again."
        ) from None
    check_names(manifest.files, folder / MANIFEST, ArtifactError)
    for shard in manifest.shards:
        if shard not in manifest.files:
            raise ArtifactError(f"{folder / MANIFEST} puts tensors into {shown(shard)}, which is not among its files.")
    for name, unit in manifest.units.items():
        if not unit.tensors or any(role_of(tensor) is None for tensor in unit.tensors):
            raise ArtifactError(f"{folder / MANIFEST}: unit {shown(name)} holds no tensor of BAGEL; copy it again.")
    return manifest


def listed_files(name: str, content: bytes, folder: Path) -> dict[str, FileEntry]:
    """The files that a manifest lists, of an artifact or an export by its file `name`. Raises ArtifactError."""
    if name == MANIFEST:
        return parse_manifest(content, folder).files
    try:
        files = _Listing.model_validate_json(content).files
    except ValidationError:
        raise ArtifactError(f"{folder / name} is damaged: it lists no files; copy the export again.") from None
    check_names(files, folder / name, ArtifactError)
    return files
