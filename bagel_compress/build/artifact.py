"""Artifact: a finished build, a folder with a manifest.

Tensors have the names that other loaders of their format use (see the codecs). The manifest adds source, recipe,
digests of everything, and the error of each tensor. It is written last, so a folder with a manifest is complete.
Opening checks that all files exist with their sizes; data that is read later is compared with its digest (`parts`,
`file`), and files that the manifest does not list are never read. `verify` reads every byte.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from blake3 import blake3

from bagel.errors import shown
from bagel.json_file import small_bytes
from bagel.layout import official_role
from bagel_compress.build.sizes import SizeGroup, group_sizes
from bagel_compress.codecs.base import TORCH_DTYPES, Codec, Rounded, Unit
from bagel_compress.errors import ArtifactError
from bagel_compress.io.bf16 import as_tensor
from bagel_compress.io.digests import blake3_of
from bagel_compress.io.safetensors_file import TensorFile, lay_out
from bagel_compress.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch


from bagel_compress.build.manifest import MANIFEST, Manifest, StoredPart, parse_manifest
from bagel_compress.build.manifest_files import changed_files, compared_file, extra_files, wrong_sizes

MODEL_FILES = {
    "llm_config.json", "vit_config.json", "config.json", "preprocessor_config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "ae.safetensors",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightedErrors:
    """Relative errors of the outputs of matrices for the calibration set's inputs: medians, and the worst one.

    `nearest` is the error with each weight rounded to nearest; `predictor` the ratio error / nearest that the second
    moments of the inputs predict.
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
    trusted: bool = False  # data that is read is not compared with its digest

    @classmethod
    def open(cls, path: str | Path, check: bool = True, trust: bool = False) -> Artifact:
        """Opens an artifact. Raises ArtifactError if the folder has no readable manifest or, with `check`, if a file is
        missing or has a wrong size. With `trust`, data is later not compared with its digest when it is read."""
        folder = Path(path)
        try:
            content = small_bytes(folder / MANIFEST)
        except OSError:
            begun = (folder / ".build").exists()
            hint = "its build did not finish, run the same command again" if begun else "give one that compress wrote"
            raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST}; {hint}.") from None
        artifact = cls(folder, parse_manifest(content, folder), hashlib.sha256(content).hexdigest(), trust)
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
        """The stored tensors of a unit, memory-mapped read-only from its shard.

        Raises ArtifactError if the digest of one does not match the manifest; a trusted artifact's are not compared.
        """
        entry, unit = self.manifest.units[name], self.unit(name)
        entry.codec.check(unit)
        if (expected := entry.codec.parts(unit).keys()) != entry.parts.keys():
            found, named = ", ".join(entry.parts), ", ".join(expected)
            raise ArtifactError(f"{self.path}: {name} has the parts {shown(found)}, expected {named}; copy it again.")
        file = self._shard(entry.shard)
        return {part: _mapped(file, part, stored, self.trusted) for part, stored in entry.parts.items()}

    def file(self, name: str) -> Path:
        """The path of a file of the manifest that is no shard. Raises ArtifactError if its digest does not match."""
        return compared_file(self.path, name, self.manifest.files, self.trusted)

    @property
    def model_files(self) -> dict[str, Path]:
        """Configs, tokenizer and VAE by their file names without folder; their digests are checked as by `file`."""
        return {Path(name).name: self.file(name) for name in self.manifest.files if Path(name).name in MODEL_FILES}

    def decode(self, name: str) -> dict[str, torch.Tensor]:
        """The decoded tensors of a unit, by official name."""
        return self.codec(name).decode(self.unit(name), self.parts(name))

    @property
    def vae_path(self) -> Path:
        """The path of the VAE's weights."""
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
        """Lowest and highest SNR in dB of the lossy units, by "component expert codec"."""
        values: dict[str, list[float]] = defaultdict(list)
        for entry in self.manifest.units.values():
            if entry.snr_db is not None:
                role = official_role(next(iter(entry.tensors)))
                values[f"{role.component} {role.expert} {entry.codec.format}"].append(entry.snr_db)
        return {name: (min(found), max(found)) for name, found in sorted(values.items())}

    def weighted_errors(self) -> list[WeightedErrors]:
        """The effect of calibrated rounding, for each component, expert and codec that has it."""
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
        """Reads every byte; returns one sentence per fault: changed, missing or extra file; changed tensors by name.

        `sums`, if given, is filled with the sha256 of each intact file of the manifest, computed in the same pass.
        """
        faults = list(wrong_sizes(self.path, self.manifest.files))
        faults += [self._changed(name) for name in changed_files(self.path, self.manifest.files, sums)]
        return faults + list(extra_files(self.path, self.manifest.files, MANIFEST))

    def _changed(self, name: str) -> str:
        """The names of a shard's tensors whose digests do not match the manifest."""
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


def _mapped(file: TensorFile, name: str, part: StoredPart, trust: bool) -> torch.Tensor:
    stored = file.tensors.get(name)
    if stored is None or (stored.dtype, stored.shape) != (part.dtype, part.shape):
        raise ArtifactError(f"{file.path} does not hold {name} as the manifest says; copy it again.")
    data = file.bytes[stored.start : stored.stop]
    if not trust and blake3(data.data, max_threads=blake3.AUTO).hexdigest() != part.blake3:
        raise ArtifactError(
            f"{file.path}: {name} is not what the manifest says: it was changed or damaged; copy it again."
        )
    return as_tensor(data).view(TORCH_DTYPES[stored.dtype]()).reshape(stored.shape)
