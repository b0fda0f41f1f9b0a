"""The manifest of an export folder: its source, target and blocks, and the digest of every file. No torch, no onnx.

The manifest is written last, so a folder that has one is complete. Engines are listed with size and digest like other
files; but two builds of the same engine differ in some bytes, so digests of two builds are never compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from bagel.config import BagelConfig
from bagel.json_file import small_bytes
from bagel_compress.build.manifest import EXPORT_MANIFEST, FileEntry, SourceEntry
from bagel_compress.build.manifest_files import changed_files, compared_file, extra_files, wrong_sizes
from bagel_compress.build.recipe import Limits, Recipe
from bagel_compress.build.speed_settings import SpeedPreset
from bagel_compress.errors import ArtifactError
from bagel_compress.io.safe_paths import check_names
from bagel_compress.io.yaml_model import FrozenModel
from bagel_compress.run.export_settings import ExportSettings, Range

MANIFEST = EXPORT_MANIFEST
UNFINISHED = ".export"  # subfolder with the records of finished data files; removed when the export is finished
FORMAT = 1


class PortEntry(FrozenModel):
    """An input or output of a block. dtype "float" is the export's precision; a name in `shape` is a symbolic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class WeightEntry(FrozenModel):
    """An initialiser: its place in the data file, in bytes. `type` is ONNX's number of the element type."""

    type: int
    shape: tuple[int, ...]
    offset: int
    bytes: int


class BlockEntry(FrozenModel):
    """One graph of the folder."""

    kind: str
    model: str  # file of the graph
    data: str  # file of its weights
    engine: str = ""  # file of the TensorRT engine, if one was built
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...]
    nodes: dict[str, int]  # operator -> count
    forms: dict[str, int]  # form (onnx_weights) -> number of matrices stored in it
    weights: dict[str, WeightEntry]  # by name of the initialiser


class ExportSource(FrozenModel):
    """The artifact or checkpoint that was exported, and the full-precision checkpoint that it was made from."""

    kind: Literal["artifact", "checkpoint"]
    name: str  # of the recipe, or of the checkpoint
    digest: str  # of the artifact's manifest, or of the checkpoint
    checkpoint: SourceEntry
    recipe: Recipe | None = None  # the artifact's; None for a checkpoint


class ExportManifest(FrozenModel):
    """The contents of `export.json`: everything known about an export when it was made."""

    format: int = FORMAT
    tool: str
    versions: dict[str, str]
    source: ExportSource
    limits: Limits  # the limits of the parity report
    target: str
    device: str  # the target's device
    disk_limit: float | None  # the target's limit in bytes for all files
    settings: ExportSettings
    axes: dict[str, Range]  # axis -> the sizes that engines are built for
    opset: int
    config: dict[str, Any]  # BagelConfig
    blocks: dict[str, BlockEntry]
    files: dict[str, FileEntry]

    @property
    def level(self) -> str:
        """The class of limits for the parity report: that of the artifact, but "16-bit" for a lossless one.

        A lossless build has the reference's weights, but another runtime never reproduces its arithmetic to the bit.
        """
        return "16-bit" if self.limits.level == "lossless" else self.limits.level

    @property
    def presets(self) -> dict[str, SpeedPreset]:
        """The presets that the recipe of its source promises, by name; its parity must hold them too."""
        recipe = self.source.recipe
        return {} if recipe is None else {str(name): preset for name, preset in recipe.fast.items()}

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n").encode()

    @property
    def model(self) -> BagelConfig:
        """The model's configuration."""
        return TypeAdapter(BagelConfig).validate_python(self.config)


def config_dict(config: BagelConfig) -> dict[str, Any]:
    """The configuration as plain data, for `ExportManifest.config`; `ExportManifest.model` reads it back."""
    return dataclasses.asdict(config)


@dataclasses.dataclass(frozen=True, slots=True)
class KindSize:
    """Sizes of all blocks of one kind.

    `reads` counts the bytes of weights that the blocks read; und_layer and gen_layer share them in one file.
    """

    kind: str
    blocks: int
    forms: dict[str, int]
    nodes: int  # in one block
    reads: int
    engines: int  # bytes of all engine files


@dataclasses.dataclass(frozen=True)
class ExportFolder:
    """A complete export: its folder, its manifest, and the sha256 of the manifest."""

    path: Path
    manifest: ExportManifest
    digest: str
    trusted: bool = False  # files that are read are not compared with their digests

    @classmethod
    def open(cls, path: str | Path, check: bool = True, trust: bool = False) -> ExportFolder:
        """Opens an export folder. Raises ArtifactError if it has no manifest or, with `check`, if a file is missing or
        has a wrong size. With `trust`, files are later not compared with their digests when they are read."""
        folder = Path(path)
        try:
            content = small_bytes(folder / MANIFEST)
        except OSError:
            begun = (folder / UNFINISHED).exists()
            hint = "its export did not finish, run the same command again" if begun else "give one that export wrote"
            raise ArtifactError(f"{folder} is no export: it has no {MANIFEST}; {hint}.") from None
        opened = cls(folder, parse_export(content, folder), hashlib.sha256(content).hexdigest(), trust)
        faults = list(wrong_sizes(folder, opened.manifest.files)) if check else []
        if faults:
            raise ArtifactError(f"{folder}: {faults[0]}; copy the export again.")
        return opened

    def verify(self, sums: dict[str, str] | None = None) -> list[str]:
        """Reads every byte and returns one sentence per fault: a changed, missing or extra file.

        `sums`, if given, is filled with the sha256 of each intact file of the manifest, computed in the same pass.
        """
        faults = list(wrong_sizes(self.path, self.manifest.files))
        faults += [f"{name} was changed" for name in changed_files(self.path, self.manifest.files, sums)]
        return faults + list(extra_files(self.path, self.manifest.files, MANIFEST))

    def file(self, name: str) -> Path:
        """The path of a file of the manifest, whose digest is checked once. Raises ArtifactError if it differs."""
        if name not in self._compared:
            self._compared[name] = compared_file(self.path, name, self.manifest.files, self.trusted)
        return self._compared[name]

    @cached_property
    def _compared(self) -> dict[str, Path]:
        return {}

    def kinds(self) -> list[KindSize]:
        """Sizes by kind of block, in the order of `blocks.all_blocks`."""
        entries: dict[str, list[BlockEntry]] = {}
        for entry in self.manifest.blocks.values():
            entries.setdefault(entry.kind, []).append(entry)
        files = self.manifest.files
        return [
            KindSize(
                kind,
                len(blocks),
                dict(sum((Counter(b.forms) for b in blocks), Counter())),
                sum(blocks[0].nodes.values()),
                sum(w.bytes for b in blocks for w in b.weights.values()),
                sum(files[b.engine].bytes for b in blocks if b.engine),
            )
            for kind, blocks in entries.items()
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def over_disk(self) -> list[str]:
        """One sentence if the files take more disk space than the target allows; else empty."""
        limit = self.manifest.disk_limit
        if limit is None or self.nbytes <= limit:
            return []
        return [f"the files have {self.nbytes / 1e9:.2f} GB, target {self.manifest.target} allows {limit / 1e9:.2f} GB"]


def parse_export(content: bytes, folder: Path) -> ExportManifest:
    """Parses a manifest; `folder` is named in errors. Raises ArtifactError on bad JSON, fields or file names."""
    try:
        manifest = ExportManifest.model_validate_json(content)
        _ = manifest.model
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ArtifactError(
            f"{folder / MANIFEST} is damaged at {where or 'its start'} ({fault['msg']}); copy the export again."
        ) from None
    check_names(manifest.files, folder / MANIFEST, ArtifactError)
    unknown = {f for b in manifest.blocks.values() for f in (b.model, b.data, b.engine) if f} - manifest.files.keys()
    if unknown:
        raise ArtifactError(f"{folder / MANIFEST} names {min(unknown)}, which is not among its files; do not use it.")
    return manifest
