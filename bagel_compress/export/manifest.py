"""The manifest of an export folder: what was exported from what, and the digest of every file. No torch, no onnx.

It is written last: present means complete. Engines are listed with their sizes and digests like any file, but two
builds of one engine differ in some bytes, so nothing compares the digests of two builds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bagel.config import BagelConfig, LLMConfig, ResizeRule, ViTConfig
from bagel_compress.errors import ArtifactError
from bagel_compress.recipe import Limits
from bagel_compress.runtime import ExportSettings, Range

MANIFEST = "export.json"
NOTES = ".export"  # folder of an export that is not finished
FORMAT = 1


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PortEntry(_Entry):
    """An input or output: dtype "float" is the export's precision; a name in `shape` is a symbolic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class WeightEntry(_Entry):
    """An initialiser in the data file; `type` is ONNX's number of the element type."""

    type: int
    shape: tuple[int, ...]
    offset: int
    bytes: int


class BlockEntry(_Entry):
    """One graph of the folder."""

    kind: str
    model: str  # file of the graph
    data: str  # file of its weights
    engine: str = ""  # file of the TensorRT engine, if one was built
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...]
    nodes: dict[str, int]  # operator -> count
    forms: dict[str, int]  # form of the matrices -> count
    weights: dict[str, WeightEntry]  # initialiser -> where it lies


class FileEntry(_Entry):
    """A file of the folder."""

    bytes: int
    sha256: str


class ExportManifest(_Entry):
    """Everything known about an export when it was built."""

    format: int = FORMAT
    tool: str
    versions: dict[str, str]
    source: dict[str, str]  # kind, name, digest, and the digest of the checkpoint behind it
    limits: Limits  # what its parity must hold
    target: str
    settings: ExportSettings
    axes: dict[str, Range]  # sizes that engines are built for
    opset: int
    config: dict[str, Any]  # BagelConfig
    blocks: dict[str, BlockEntry]
    files: dict[str, FileEntry]

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n").encode()

    @property
    def model(self) -> BagelConfig:
        """The model's configuration."""
        data = dict(self.config)
        parts = {"llm": LLMConfig, "vit": ViTConfig, "vae_rule": ResizeRule, "vit_rule": ResizeRule}
        return BagelConfig(**data | {name: part(**data[name]) for name, part in parts.items()})


def config_dict(config: BagelConfig) -> dict[str, Any]:
    """The inverse of `ExportManifest.model`."""
    return dataclasses.asdict(config)


@dataclasses.dataclass(frozen=True)
class ExportFolder:
    """A complete export."""

    path: Path
    manifest: ExportManifest
    digest: str

    @classmethod
    def open(cls, path: str | Path) -> ExportFolder:
        """Raises ArtifactError if the folder is no complete export: no manifest, a missing file, a wrong size."""
        folder = Path(path)
        try:
            content = (folder / MANIFEST).read_bytes()
        except OSError:
            begun = (folder / NOTES).exists()
            hint = "its export did not finish, run the same command again" if begun else "give one that export wrote"
            raise ArtifactError(f"{folder} is no export: it has no {MANIFEST}; {hint}.") from None
        opened = cls(folder, _parse(content, folder), hashlib.sha256(content).hexdigest())
        for name, entry in opened.manifest.files.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != entry.bytes:
                state = "is missing" if found is None else f"has {found} bytes, the manifest says {entry.bytes}"
                raise ArtifactError(f"{folder}: {name} {state}; copy the export again.")
        return opened

    def verify(self) -> list[str]:
        """Reads every byte. One sentence per changed or extra file."""
        faults = [f"{n} was changed" for n, e in self.manifest.files.items() if file_sha256(self.path / n) != e.sha256]
        known = self.manifest.files.keys() | {MANIFEST, "README.md", "LICENSE", "SHA256SUMS", "report.html"}
        for file in sorted(p for p in self.path.iterdir() if p.is_file() and p.name not in known):
            faults.append(f"{file.name} is not in the manifest")
        return faults


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(content: bytes, folder: Path) -> ExportManifest:
    try:
        manifest = ExportManifest.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ArtifactError(
            f"{folder / MANIFEST} is damaged at {where or 'its start'} ({fault['msg']}); copy the export again."
        ) from None
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or ":" in name:
            raise ArtifactError(f"{folder / MANIFEST} points outside its folder ({name}); do not use this export.")
    return manifest
