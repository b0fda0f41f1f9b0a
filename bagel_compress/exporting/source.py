"""Sources of an export's weights: a compressed artifact, or a full-precision checkpoint.

Blocks name tensors by their path in `bagel.Bagel` ("layers.3.und.q_proj.weight", "vae.decoder.conv_in.weight"), and so
do the methods here. Files are memory-mapped; one unit is decoded at a time.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from bagel.config import BagelConfig
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import MANIFEST, SourceEntry
from bagel_compress.build.recipe import Limits
from bagel_compress.codecs.base import TORCH_DTYPES, Codec
from bagel_compress.codecs.raw import Raw
from bagel_compress.errors import ArtifactError
from bagel_compress.exporting.manifest import ExportSource
from bagel_compress.io.atomic import atomic_path
from bagel_compress.io.safetensors_file import TensorFile
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.source.checkpoint import CONFIG_FILES, OTHER_FILES, TOKENIZER_FILES, Checkpoint

if TYPE_CHECKING:
    import torch

    from bagel.vae import VAEConfig

VAE_PREFIX = "vae."
FOLDER_FILES = (*CONFIG_FILES, *TOKENIZER_FILES, *OTHER_FILES)


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor as an artifact stores it: its spec, its codec, and the codec's parts by name."""

    spec: TensorSpec
    codec: Codec
    parts: Mapping[str, torch.Tensor]


class WeightSource(ABC):
    """The weights of a model by their path in Bagel, and its other files."""

    identity: ExportSource
    limits: Limits  # the limits of the parity report

    @staticmethod
    def open(path: str | Path) -> WeightSource:
        """Opens an artifact if the folder has a manifest (or an unfinished build), else a checkpoint.

        Raises ArtifactError or CheckpointError.
        """
        folder = Path(path)
        if (folder / MANIFEST).exists() or (folder / ".build").exists():
            return ArtifactSource(Artifact.open(folder))
        return CheckpointSource(Checkpoint.open(folder))

    @property
    @abstractmethod
    def specs(self) -> Mapping[str, TensorSpec]:
        """Official name -> spec of every tensor except the VAE's."""

    @property
    @abstractmethod
    def files(self) -> Mapping[str, Path]:
        """Configs and tokenizer files by name."""

    @property
    @abstractmethod
    def vae(self) -> TensorFile:
        """The opened file of the VAE's weights."""

    @abstractmethod
    def codec(self, path: str) -> Codec:
        """The codec that a tensor is stored with."""

    @abstractmethod
    def encoded(self, path: str) -> EncodedTensor:
        """The tensor in its stored form."""

    @abstractmethod
    def _decoded(self, official: str) -> torch.Tensor:
        """The decoded tensor of an official name."""

    def tensor(self, path: str) -> torch.Tensor:
        """The tensor's decoded values; a view of the mapped file if they are stored plainly."""
        if path.startswith(VAE_PREFIX):
            from bagel_compress.io.bf16 import as_tensor

            name = path.removeprefix(VAE_PREFIX)
            stored = self.vae.tensors[name]
            data = as_tensor(self.vae.bytes[stored.start : stored.stop])
            return data.view(TORCH_DTYPES[stored.dtype]()).reshape(stored.shape)
        return self._decoded(self.official[path])

    @cached_property
    def official(self) -> dict[str, str]:
        """Path in Bagel -> official tensor name."""
        from bagel.loading import parameter_path

        return {parameter_path(name): name for name in self.specs}

    def copy_files(self, folder: Path) -> None:
        """Copies configs and tokenizer into a folder."""
        for name, file in self.files.items():
            if name in FOLDER_FILES:
                with atomic_path(folder / name) as partial:
                    shutil.copyfile(file, partial)

    def configs(self, folder: Path) -> tuple[BagelConfig, VAEConfig]:
        """The configurations of model and VAE, read from a folder that `copy_files` has filled."""
        from bagel.loading import read_config, vae_config

        vae_shapes = {name: t.shape for name, t in self.vae.tensors.items()}
        shapes = {name: spec.shape for name, spec in self.specs.items()}
        return read_config(folder, shapes, vae_shapes), vae_config(folder, vae_shapes)


class CheckpointSource(WeightSource):
    """A full-precision checkpoint; every tensor is raw bf16."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        c = checkpoint
        entry = SourceEntry.of(c, c.digest, "")
        self.identity = ExportSource(kind="checkpoint", name=c.name, digest=c.digest, checkpoint=entry)
        self.limits = Limits.model_validate({})

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {spec.name: spec for spec in self._checkpoint.specs}

    @property
    def files(self) -> Mapping[str, Path]:
        return self._checkpoint.files

    @property
    def vae(self) -> TensorFile:
        return self._checkpoint.vae

    def codec(self, path: str) -> Codec:
        return Raw()

    def encoded(self, path: str) -> EncodedTensor:
        spec = self.specs[self.official[path]]
        return EncodedTensor(spec, Raw(), {spec.name: self._decoded(spec.name)})

    def _decoded(self, official: str) -> torch.Tensor:
        spec = self.specs[official]
        return self._checkpoint.read(spec, 0, spec.numel).reshape(spec.shape)


class ArtifactSource(WeightSource):
    """A compressed artifact. The unit decoded last is cached, since a unit may hold several tensors."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        recipe = artifact.manifest.recipe
        self.identity = ExportSource(
            kind="artifact",
            name=recipe.name,
            digest=artifact.digest,
            checkpoint=artifact.manifest.source,
            recipe=recipe,
        )
        self.limits = recipe.limits
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {spec.name: spec for unit in self._artifact.units() for spec in unit.specs}

    @property
    def files(self) -> Mapping[str, Path]:
        return {name: self._artifact.file(name) for name in FOLDER_FILES if name in self._artifact.manifest.files}

    @cached_property
    def vae(self) -> TensorFile:
        return TensorFile.open(self._artifact.model_files["ae.safetensors"], ArtifactError)

    def codec(self, path: str) -> Codec:
        return Raw() if path.startswith(VAE_PREFIX) else self._artifact.codec(self._unit(path))

    def encoded(self, path: str) -> EncodedTensor:
        unit = self._unit(path)
        return EncodedTensor(self.specs[self.official[path]], self._artifact.codec(unit), self._artifact.parts(unit))

    def _unit(self, path: str) -> str:
        return self._artifact.manifest.unit_of[self.official[path]]

    def _decoded(self, official: str) -> torch.Tensor:
        unit = self._artifact.manifest.unit_of[official]
        if self._last[0] != unit:
            self._last = (unit, self._artifact.decode(unit))
        return self._last[1][official]
