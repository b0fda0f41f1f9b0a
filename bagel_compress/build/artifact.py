"""Artifact: a finished folder, and its manifest.

The tensors lie in the format's own ecosystem's names (see the codecs); the manifest adds what those lack: what was
built from what by which recipe, digests of everything, and the error of each tensor. It is written last: present means
complete. Opening checks that all files are there with their sizes; what is read later is compared with the manifest
as it is read (`parts`, `file`), and nothing is read that it does not list. `verify` reads every byte.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from blake3 import blake3
from pydantic import BeforeValidator, SerializeAsAny, SerializerFunctionWrapHandler, ValidationError, model_serializer

from bagel.layout import official_role
from bagel_compress.build.recipe import Recipe, parse_codec
from bagel_compress.build.sizes import SizeGroup, group_sizes
from bagel_compress.codecs.base import TORCH_DTYPES, Codec, Rounded, Unit
from bagel_compress.errors import ArtifactError
from bagel_compress.io.bf16 import as_tensor
from bagel_compress.io.digests import Hash, blake3_file, blake3_of, tensors_digest
from bagel_compress.io.safe_paths import check_names
from bagel_compress.io.safetensors_file import TensorFile, lay_out
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec
from bagel_compress.io.yaml_model import FrozenModel

if TYPE_CHECKING:
    import torch

    from bagel_compress.source.adapter import Adapter
    from bagel_compress.source.checkpoint import Base, Checkpoint

MANIFEST = "manifest.json"
EXPORT_MANIFEST = "export.json"  # of a folder of graphs or engines; what it holds is export's matter
MANIFESTS = (MANIFEST, EXPORT_MANIFEST)
FORMAT = 1  # version of the manifest's fields
# What may lie beside the files of the manifest: written after the build, by validation, publishing or signing.
EXTRAS = {"README.md", "LICENSE", "SHA256SUMS", "model.sig", "report.html", ".gitattributes"}
MODEL_FILES = {
    "llm_config.json", "vit_config.json", "config.json", "preprocessor_config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "ae.safetensors",
}  # fmt: skip
EXTRA_FOLDERS = {"reports", ".cache", ".git"}


class StoredPart(FrozenModel):
    """A stored tensor of a shard."""

    dtype: str
    shape: tuple[int, ...]
    blake3: str

    @property
    def spec(self) -> PartSpec:
        return PartSpec(self.dtype, self.shape)


class TensorEntry(FrozenModel):
    """A tensor of the checkpoint; `blake3` is over the bf16 values that were coded."""

    dtype: str
    shape: tuple[int, ...]
    blake3: str


class UnitEntry(FrozenModel):
    """One unit: its tensors, how they were coded, and what is stored."""

    codec: Annotated[SerializeAsAny[Codec], BeforeValidator(parse_codec)]
    shard: str
    tensors: dict[str, TensorEntry]
    parts: dict[str, StoredPart]
    snr_db: float | None = None  # of the decoded weights; None: nothing was lost
    reason: str = ""  # why the codec is not the recipe's
    rounded: Rounded | None = None  # what a calibrated rounding did; a weight rounded alone has no such key

    @model_serializer(mode="wrap")
    def _without_rounded(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.rounded is None:
            del fields["rounded"]
        return fields


class FileEntry(FrozenModel):
    """A file of the folder, with the digest of its bytes or, for a shard, the one that follows from its tensors'."""

    bytes: int
    blake3: str = ""
    blake3_tensors: str = ""  # see `tensors_digest`

    @property
    def digests(self) -> dict[str, str]:
        """Name of the algorithm -> digest; the one that there is."""
        return {"blake3_tensors": self.blake3_tensors} if self.blake3_tensors else {"blake3": self.blake3}


class _Listing(FrozenModel, extra="ignore"):
    """What the manifests of artifacts and of exports have in common."""

    files: dict[str, FileEntry]


class AdapterEntry(FrozenModel):
    """An adapter that was merged into the weights; `blake3` is over its config and its weights, as files."""

    name: str
    blake3: str
    scales: tuple[float, float]  # least and largest factor of what it adds


class BaseEntry(FrozenModel):
    """A second checkpoint that gave what the first one lacked: tensors, and files by their names."""

    name: str
    revision: str
    files: tuple[str, ...]
    tensors: tuple[str, ...]


class SourceEntry(FrozenModel):
    """The checkpoint that was compressed: its identity, and `data_blake3` over every value that was read.

    `adapter` and `base` are what else decided the values; both are in the identity, which is of the merged values.
    """

    name: str
    revision: str
    digest: str
    data_blake3: str
    adapter: AdapterEntry | None = None
    base: BaseEntry | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, digest: str, data_blake3: str) -> SourceEntry:
        """What a manifest says of a checkpoint whose identity is `digest`."""
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
    """The calibration set that chose the codes: its file's sha256, the checkpoint that made it, what it holds."""

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
        """A build without calibration has no such key."""
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


@dataclass(frozen=True, slots=True)
class WeightedErrors:
    """Relative errors of layers' outputs over the calibration set's rows; medians over matrices, and the worst one.

    `nearest`: with each weight rounded alone. `predictor`: what the moments alone let expect of error over nearest.
    """

    group: str  # component, expert, codec
    matrices: int
    error: float
    worst: float
    nearest: float
    predictor: float


@dataclass(frozen=True)
class Artifact:
    """A complete artifact folder: what `compress` wrote, opened from its manifest; weights are mapped, not loaded.

    `digest` (sha256 of the manifest) identifies the build. `verify` reads every byte and returns one sentence per
    fault. Raises ArtifactError on a folder that is no artifact or not a complete one.

        artifact = bc.Artifact.open("out/nf4")
        print(artifact.digest, artifact.verify())
        tensors = artifact.decode(artifact.units()[0].name)  # official name -> bf16 tensor in the checkpoint's shape
    """

    path: Path
    manifest: Manifest
    digest: str  # sha256 of the manifest: identity of the artifact

    @classmethod
    def open(cls, path: str | Path, check: bool = True) -> Artifact:
        """Raises ArtifactError if the folder has no readable manifest, or, unless not asked to `check`, if a file is
        missing or has a wrong size."""
        folder = Path(path)
        try:
            content = (folder / MANIFEST).read_bytes()
        except OSError:
            begun = (folder / ".build").exists()
            hint = "its build did not finish, run the same command again" if begun else "give one that compress wrote"
            raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST}; {hint}.") from None
        artifact = cls(folder, parse_manifest(content, folder), hashlib.sha256(content).hexdigest())
        faults = list(wrong_sizes(folder, artifact.manifest.files)) if check else []
        if faults:
            raise ArtifactError(f"{folder}: {faults[0]}; copy the artifact again.")
        return artifact

    def units(self) -> list[Unit]:
        """All units with the specs of their tensors, in manifest order."""
        return [self.unit(name) for name in self.manifest.units]

    def unit(self, name: str) -> Unit:
        """One unit by its name."""
        tensors = self.manifest.units[name].tensors
        return Unit(name, tuple(TensorSpec(t.dtype, t.shape, n) for n, t in tensors.items()))

    def codec(self, name: str) -> Codec:
        """The codec that decodes this unit."""
        return self.manifest.units[name].codec

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """The stored tensors of a unit, mapped read-only from its shard: nothing is copied.

        Raises ArtifactError if one is not what the manifest says, byte for byte.
        """
        entry = self.manifest.units[name]
        file = self._shard(entry.shard)
        return {part: _mapped(file, part, stored) for part, stored in entry.parts.items()}

    def file(self, name: str) -> Path:
        """The path of a file of the manifest that is no shard. Raises ArtifactError if its bytes are others."""
        return compared_file(self.path, name, self.manifest.files)

    @property
    def model_files(self) -> dict[str, Path]:
        """Configs, tokenizer and VAE by their own names, without their folder; compared as by `file`."""
        return {Path(name).name: self.file(name) for name in self.manifest.files if Path(name).name in MODEL_FILES}

    def decode(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a unit as the format defines them."""
        return self.codec(name).decode(self.unit(name), self.parts(name))

    @property
    def vae_path(self) -> Path:
        """Where this artifact keeps the VAE."""
        return self.path / next(name for name in self.manifest.files if name.endswith("ae.safetensors"))

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.manifest.files[shard].bytes for shard in self.manifest.shards)

    def groups(self) -> list[SizeGroup]:
        """Sizes by component, expert and codec."""
        entries = self.manifest.units.items()
        return group_sizes(
            (e.codec, self.unit(name).specs, sum(p.spec.nbytes for p in e.parts.values())) for name, e in entries
        )

    def snr(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest SNR in dB of the units of each "component expert codec" that lost something."""
        values: dict[str, list[float]] = defaultdict(list)
        for entry in self.manifest.units.values():
            if entry.snr_db is not None:
                role = official_role(next(iter(entry.tensors)))
                values[f"{role.component} {role.expert} {entry.codec.format}"].append(entry.snr_db)
        return {name: (min(found), max(found)) for name, found in sorted(values.items())}

    def weighted_errors(self) -> list[WeightedErrors]:
        """What calibrated rounding did, of each "component expert codec" that has it."""
        found: dict[str, list[Rounded]] = defaultdict(list)
        for entry in self.manifest.units.values():
            if entry.rounded is not None:
                role = official_role(next(iter(entry.tensors)))
                found[f"{role.component} {role.expert} {entry.codec.format}"].append(entry.rounded)
        return [
            WeightedErrors(
                group,
                len(rounded),
                median(r.error**0.5 for r in rounded),
                max(r.error**0.5 for r in rounded),
                median(r.nearest**0.5 for r in rounded),
                median(r.predictor for r in rounded),
            )
            for group, rounded in sorted(found.items())
        ]

    def verify(self, sums: dict[str, str] | None = None) -> list[str]:
        """Reads every byte. One sentence per fault: changed, missing or extra file; changed tensors by name.

        `sums` is filled with the sha256 of each intact file of the manifest, taken in the same reading.
        """
        faults = list(wrong_sizes(self.path, self.manifest.files))
        faults += [self._changed(name) for name in changed_files(self.path, self.manifest.files, sums)]
        return faults + list(extra_files(self.path, self.manifest.files, MANIFEST))

    def _changed(self, name: str) -> str:
        """Names the tensors of a shard whose bytes are not those of the manifest."""
        stored = {part: p for u in self.manifest.units.values() if u.shard == name for part, p in u.parts.items()}
        if not stored:
            return f"{name} was changed"
        header, offsets = lay_out({part: p.spec for part, p in stored.items()})
        wrong = []
        with (self.path / name).open("rb") as file:
            if file.read(len(header)) != header:
                wrong.append("its header")
            for part, p in stored.items():
                file.seek(offsets[part])
                if blake3_of(file, p.spec.nbytes) != p.blake3:
                    wrong.append(part)
        return f"{name} was changed: {', '.join(wrong[:3])}{' and more' if len(wrong) > 3 else ''}"

    def _shard(self, name: str) -> TensorFile:
        if name not in self._shards:
            self._shards[name] = TensorFile.open(self.path / name, ArtifactError)
        return self._shards[name]

    @cached_property
    def _shards(self) -> dict[str, TensorFile]:
        return {}


def compared_file(folder: Path, name: str, files: Mapping[str, FileEntry]) -> Path:
    """The path of a file that a manifest lists. Raises ArtifactError if it does not, or if the bytes are others."""
    if name not in files:
        raise ArtifactError(f"{folder} has no {name} among the files of its manifest; copy it again.")
    path = folder / name
    try:
        same = intact(path, files[name])
    except OSError as fault:
        raise ArtifactError(f"{path} cannot be read ({fault.strerror}).") from None
    if not same:
        raise ArtifactError(f"{path} is not what the manifest says: it was changed or damaged; copy it again.")
    return path


def wrong_sizes(folder: Path, files: Mapping[str, FileEntry]) -> Iterator[str]:
    """A sentence per file of a manifest that is missing or has another size."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != entry.bytes:
            yield f"{name} has {path.stat().st_size} bytes, the manifest says {entry.bytes}"


def changed_files(folder: Path, files: Mapping[str, FileEntry], sums: dict[str, str] | None = None) -> Iterator[str]:
    """Reads the files of a manifest that have the right size; names those with other bytes.

    `sums` is filled with the sha256 of the others, taken in the same reading.
    """
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            continue
        if sums is None:
            whole = intact(path, entry)
        else:
            sha256 = intact_sha256(path, entry)
            whole = sha256 is not None
            if sha256 is not None:
                sums[name] = sha256
        if not whole:
            yield name


def extra_files(folder: Path, files: Mapping[str, FileEntry], manifest: str) -> Iterator[str]:
    """A sentence per file that is neither in the manifest nor one of those that come to lie beside a build."""
    known = files.keys() | EXTRAS | {manifest}
    for path in (p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()):
        if path.as_posix() not in known and path.parts[0] not in EXTRA_FOLDERS:
            yield f"{path.as_posix()} is not in the manifest"


def intact(path: Path, entry: FileEntry) -> bool:
    """Reads the file: whether its bytes are those of the entry."""
    return _matches(path, entry, None)


def intact_sha256(path: Path, entry: FileEntry) -> str | None:
    """Reads the file once: its sha256 if its bytes are those of the entry, else None."""
    total = hashlib.sha256()
    return total.hexdigest() if _matches(path, entry, total) else None


def _matches(path: Path, entry: FileEntry, also: Hash | None) -> bool:
    """Whether the file's bytes are those of the entry; `also` is fed with all of them if they are."""
    if path.stat().st_size != entry.bytes:
        return False
    if not entry.blake3_tensors:
        return blake3_file(path, also) == entry.blake3
    try:
        file = TensorFile.open(path, ArtifactError)
    except ArtifactError:
        return False
    in_file = sorted(file.tensors.values(), key=lambda tensor: (tensor.start, tensor.stop))
    with path.open("rb") as opened:
        start = opened.read(8 + len(file.header))  # the tensors follow without a gap up to the end of the file
        if also is not None:
            also.update(start)
        digests = [blake3_of(opened, tensor.nbytes, also) for tensor in in_file]
    return tensors_digest(file.header, digests) == entry.blake3_tensors


def parse_manifest(content: bytes, folder: Path) -> Manifest:
    """A manifest's content; `folder` names it in errors. Raises ArtifactError: no JSON, wrong fields, unsafe names."""
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
            raise ArtifactError(f"{folder / MANIFEST} puts tensors into {shard}, which is not among its files.")
    return manifest


def listed_files(name: str, content: bytes, folder: Path) -> dict[str, FileEntry]:
    """The files that a manifest of either kind lists; `name` is its own. Raises ArtifactError as `parse_manifest`."""
    if name == MANIFEST:
        return parse_manifest(content, folder).files
    try:
        files = _Listing.model_validate_json(content).files
    except ValidationError:
        raise ArtifactError(f"{folder / name} is damaged: it lists no files; copy the export again.") from None
    check_names(files, folder / name, ArtifactError)
    return files


def _mapped(file: TensorFile, name: str, part: StoredPart) -> torch.Tensor:
    stored = file.tensors.get(name)
    if stored is None or (stored.dtype, stored.shape) != (part.dtype, part.shape):
        raise ArtifactError(f"{file.path} does not hold {name} as the manifest says; copy it again.")
    data = file.bytes[stored.start : stored.stop]
    if blake3(data.data, max_threads=blake3.AUTO).hexdigest() != part.blake3:
        raise ArtifactError(
            f"{file.path}: {name} is not what the manifest says: it was changed or damaged; copy it again."
        )
    return as_tensor(data).view(TORCH_DTYPES[stored.dtype]()).reshape(stored.shape)
