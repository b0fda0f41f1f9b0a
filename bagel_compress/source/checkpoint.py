"""Checkpoint: a BAGEL folder, file or Hub repository as one list of tensors under their official names.

Fine-tunes are normalised while they are read, and never loaded as a whole: sharded files, fp32 or fp16 weights (rounded
to bf16, to nearest even), wrapper prefixes, configs in another folder, LoRA adapters. So every packaging of the same
weights has the same specs, the same values and the same `digest`.

bf16 numbers are handled as uint16 arrays of their bits ("words") in numpy; torch is imported only by `read`, which the
codecs call. Files are read, not memory-mapped: a source that is truncated meanwhile raises an error instead of a bus
fault, and the bytes that are hashed are the bytes that are encoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel.config import BagelConfig
from bagel.errors import BagelError
from bagel.json_file import read_object
from bagel.layout import ModelSizes, expected_tensors, role_of
from bagel_compress.errors import CheckpointError
from bagel_compress.io import bf16
from bagel_compress.io.digests import blake3_file
from bagel_compress.io.hub_client import parse_repo_id
from bagel_compress.io.safe_paths import check_names, exists, leads_away
from bagel_compress.io.safetensors_file import Stamp, StoredTensor, TensorFile, stamp_of
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.source.adapter import ADAPTER_FILES, Adapter
from bagel_compress.source.checkpoint_download import fetch
from bagel_compress.source.identity import FILES, identity, tensor_digests

if TYPE_CHECKING:
    import numpy as np
    import torch

WEIGHT_FILES = ("ema.safetensors", "model.safetensors", "model.safetensors.index.json")  # first found is read
VAE_FILES = ("ae.safetensors", "vae/ae.safetensors")
CONFIG_FILES = ("llm_config.json", "vit_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json",
)  # fmt: skip
OTHER_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "LICENSE")
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
SAMPLE = 512  # elements at the start, the middle and the end of each tensor that enter the fingerprint


@dataclass(frozen=True)
class Base:
    """The files and tensors that were taken from a second checkpoint, because the first one lacks them."""

    name: str
    revision: str
    files: tuple[str, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A full-precision BAGEL checkpoint: the specs of all tensors under their official names, and the other files.

    `open` takes a folder, a .safetensors file or a Hub id. Shards, fp32 or fp16 weights, prefixes of training wrappers
    and LoRA adapters are normalised while they are read; all specs are bf16. Weights are not loaded: `read` gives
    elements of one tensor. `digest` identifies the weights, whatever their packaging. Raises CheckpointError, HubError.

        checkpoint = bc.Checkpoint.open("my-fine-tune", base="ByteDance-Seed/BAGEL-7B-MoT")
        print(checkpoint.digest, len(checkpoint.specs))
        first_ten = checkpoint.read(checkpoint.specs[0], 0, 10)  # bf16 tensor [10] of the flattened first tensor
    """

    name: str  # repository id, or "local": the path of a folder must not change the build made from it
    revision: str  # commit of the repository; empty for a folder
    specs: tuple[TensorSpec, ...]
    files: Mapping[str, Path]  # configs, tokenizer and the VAE, by name; the VAE is always called `ae.safetensors`
    sources: Mapping[str, tuple[TensorFile, StoredTensor]] = field(repr=False)
    vae: TensorFile = field(repr=False)
    adapter: Adapter | None = None
    base: Base | None = None
    stamps: Mapping[Path, Stamp | None] = field(default_factory=dict, repr=False)  # size and times of files when opened

    @classmethod
    def open(cls, source: str | Path, base: str | Path | None = None, lora: str | Path | None = None) -> Checkpoint:
        """Opens a folder, a .safetensors file or a Hub id (`owner/name` or `owner/name@revision`).

        `base` is a second checkpoint, which supplies the configs, tokenizer, VAE and tensors that a fine-tune lacks,
        such as the ViT of one that was trained without it. `lora` is the folder of a peft adapter to merge.
        Raises CheckpointError if anything is missing, damaged, or not of the shape that the configs give.
        """
        path, name, revision = locate(source, weights=True)
        folder = path if path.is_dir() else path.parent
        second = None if base is None else locate(base, weights=False)
        folders = [folder] if second is None else [folder, second[0] if second[0].is_dir() else second[0].parent]
        sources = _normalised(_tensor_files(path), path)
        files = _aux_files(folders)
        vae = _vae(files["ae.safetensors"])
        given: Base | None = None
        if base is not None and second is not None:
            taken = _missing_from(base, sources, files, vae)
            names = tuple(sorted(n for n, file in files.items() if folder not in file.parents))
            sources, given = sources | taken, Base(second[1], second[2], names, tuple(sorted(taken)))
        stamps = {file: stamp_of(file) for file in files.values()}
        adapter = None if lora is None else Adapter.open(Path(lora), normal_name, sources)
        if adapter is not None:
            sources |= adapter.replaced
        _check(sources, files, path, vae)
        _check_tokenizer(sources, files, folder)
        specs = tuple(TensorSpec("BF16", t.shape, n) for n, (_, t) in sorted(sources.items()))
        if lora is not None:
            stamps |= {Path(lora) / name: stamp_of(Path(lora) / name) for name in ADAPTER_FILES}
        stamps |= {file.path: file.stamp for file, _ in sources.values()}
        return cls(name, revision, specs, files, sources, vae, adapter, given, stamps)

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The parsed config files by name: llm_config.json, vit_config.json and, if present, config.json and others."""
        return {name: _json(path) for name, path in self.files.items() if name.endswith("config.json")}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {spec.name: spec.shape for spec in self.specs}

    def bf16_words(self, name: str, start: int, stop: int) -> np.ndarray:
        """The bits of elements [start, stop) of the flattened tensor in bf16, as a 1-D uint16 array.

        Raises CheckpointError if the file has changed since it was opened.
        """
        file, tensor = self.sources[name]
        if file.changed():
            raise CheckpointError(f"{file.path} was changed while it was read; start again with the finished file.")
        if self.adapter is not None and name in self.adapter.pairs:
            return bf16.rounded(_merged(self.adapter, name, file, tensor, start, stop))
        values = bf16.stored(file, tensor, start, stop)
        return values if tensor.dtype == "BF16" else bf16.rounded(bf16.floats(values, tensor.dtype))

    def read(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        """`bf16_words` as a 1-D bf16 torch tensor. This method is the Reader that codecs are given."""
        return bf16.as_tensor(self.bf16_words(spec.name, start, stop))

    @cached_property
    def fingerprint(self) -> str:
        """A quick identification that reads little: sha256 of names, shapes, configs and samples of every tensor.

        The samples are 512 elements at the start, middle and end of each tensor, as bf16. They tell most checkpoints
        apart, and a plan records the fingerprint; only `digest` identifies all values.
        """
        total = hashlib.sha256(b"bagel-compress fingerprint 2\n")
        for name in CONFIG_FILES:
            total.update(json.dumps(self.configs[name], sort_keys=True).encode() + b"\n")
        for spec in self.specs:
            total.update(f"{spec.name} {list(spec.shape)}\n".encode())
            middle = max(0, spec.numel // 2 - SAMPLE // 2)
            for start in (0, middle, max(0, spec.numel - SAMPLE)):
                total.update(self.bf16_words(spec.name, start, min(start + SAMPLE, spec.numel)).tobytes())
        for name, tensor in sorted(self.vae.tensors.items()):
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        return total.hexdigest()

    @cached_property
    def digest(self) -> str:
        """The identity of the checkpoint: sha256 over all tensor values, configs, tokenizer and VAE (`identity`).

        Reads everything once. Another packaging of the same weights has the same digest. Raises CheckpointError if a
        file changes meanwhile.
        """
        files = {name: blake3_file(path) for name, path in self.files.items() if name in FILES}
        found = identity(self.specs, tensor_digests(self.specs, self.bf16_words), self.configs, files)
        self.expect_unchanged()
        return found

    def expect_unchanged(self) -> None:
        """Raises CheckpointError if any file has changed since the checkpoint was opened."""
        for path, stamp in self.stamps.items():
            if stamp_of(path) != stamp:
                raise CheckpointError(f"{path} was changed while it was read; start again with the finished file.")


def normal_name(name: str) -> str | None:
    """The official name of a tensor that a trainer or wrapper may have renamed; None if BAGEL has no such tensor."""
    for wrapper in WRAPPERS:
        name = name.replace(f".{wrapper}", ".").removeprefix(wrapper)
    while role_of(name) is None and name.startswith("model."):
        name = name.removeprefix("model.")
    role = role_of(name)
    return name if role is not None and role.component != "vae" else None


def locate(source: str | Path, weights: bool) -> tuple[Path, str, str]:
    """(local path, public name, revision) of a source; a repository id is downloaded, with its `weights` if asked."""
    path = Path(source)
    if exists(path):
        if (path / "manifest.json").exists():
            raise CheckpointError(
                f"{path} is an artifact of bagel-compress, not a full-precision checkpoint; give its source."
            )
        return path, "local", ""
    repository = parse_repo_id(str(source))
    if repository is None:
        raise CheckpointError(
            f"{source} does not exist; give a checkpoint folder, a .safetensors file or a Hub id (owner/name)."
        )
    small = (*CONFIG_FILES, *VAE_FILES, *TOKENIZER_FILES, *OTHER_FILES)
    folder, revision = fetch(*repository, small, WEIGHT_FILES if weights else ())
    return folder, repository[0], revision


def _aux_files(folders: list[Path]) -> dict[str, Path]:
    """Configs, tokenizer and VAE by name, each from the first folder that has it.

    Raises CheckpointError if no folder has one that is needed.
    """
    places = {name: (name,) for name in (*CONFIG_FILES, *TOKENIZER_FILES, *OTHER_FILES)} | {"ae.safetensors": VAE_FILES}
    files: dict[str, Path] = {}
    for name, options in places.items():
        found = [folder / option for folder in folders for option in options if (folder / option).exists()]
        if found:
            files[name] = found[0]
    for file in files.values():
        if not file.is_file():
            raise CheckpointError(f"{file} is no file; put the file of the base model there.")
        if file.suffix != ".safetensors" and leads_away(file, file.parent):  # the target would be copied into builds
            raise CheckpointError(
                f"{file} is a link to {file.resolve()}, outside its folder; put the file itself there."
            )
    for name in (*CONFIG_FILES, "ae.safetensors"):
        if name not in files:
            raise CheckpointError(
                f"{folders[0]} has no {name}; copy it from the base model or name a folder that has it with --base."
            )
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files.keys():
        raise CheckpointError(
            f"{folders[0]} has no tokenizer.json; copy it from the base model or name a folder that has it with --base."
        )
    return files


def _tensor_files(path: Path) -> list[TensorFile]:
    """The opened file or shards that hold the weights."""
    if path.is_file():
        return [TensorFile.open(path)]
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{path} has no weights; expected one of {', '.join(WEIGHT_FILES)}.")
    return [TensorFile.open(found)] if found.suffix == ".safetensors" else _indexed(found)


def _indexed(index: Path) -> list[TensorFile]:
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files; copy it again.")
    check_names(sorted(set(weight_map.values())), index, CheckpointError)
    for file in sorted(set(weight_map.values())):
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names {file}, which is not there; copy the missing shard.")
    files = {file: TensorFile.open(index.parent / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in files[file].tensors:
            raise CheckpointError(f"{index} says that {file} holds {name}, but it does not; copy both again.")
    vae = {file for name, file in weight_map.items() if (role := role_of(name)) and role.component == "vae"}
    return [file for name, file in files.items() if name not in vae]  # an index made for a server lists the VAE too


def _normalised(files: list[TensorFile], path: Path) -> dict[str, tuple[TensorFile, StoredTensor]]:
    """Official name -> (file, stored tensor). Raises CheckpointError on tensors that are unknown or stored twice."""
    sources: dict[str, tuple[TensorFile, StoredTensor]] = {}
    for file in files:
        for stored_name, tensor in file.tensors.items():
            name = normal_name(stored_name)
            if name is None:
                raise CheckpointError(
                    f"{file.path} holds {stored_name}, which is no tensor of BAGEL; remove it or use another file."
                )
            if name in sources:
                raise CheckpointError(
                    f"{path} holds {name} twice ({stored_name} in {file.path.name}); remove one of them."
                )
            if tensor.dtype not in bf16.WIDTHS:
                raise CheckpointError(
                    f"{file.path}: {stored_name} is {tensor.dtype}, expected BF16, F16 or F32 weights."
                )
            sources[name] = (file, tensor)
    return sources


def _missing_from(
    base: str | Path, sources: Mapping[str, Any], files: Mapping[str, Path], vae: TensorFile
) -> dict[str, Any]:
    """The tensors that the configs call for and `sources` lack, from the checkpoint `base` as far as it has them."""
    expected = expected_tensors(_sizes(files, {name: tensor.shape for name, (_, tensor) in sources.items()}, vae))
    if not expected.keys() - sources.keys():
        return {}  # the base's weights are then not downloaded
    path = locate(base, weights=True)[0]
    offered = _normalised(_tensor_files(path), path)
    return {name: offered[name] for name in expected.keys() - sources.keys() if name in offered}


def _check(
    sources: Mapping[str, tuple[TensorFile, StoredTensor]], files: Mapping[str, Path], path: Path, vae: TensorFile
) -> None:
    """Raises CheckpointError unless the tensors are exactly those that the configs call for, each of its shape."""
    shapes = {name: tensor.shape for name, (_, tensor) in sources.items()}
    expected = expected_tensors(_sizes(files, shapes, vae))
    if missing := sorted(expected.keys() - shapes.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path} lacks {missing[0]}{more}; it is not a complete BAGEL checkpoint of this configuration."
        )
    if extra := sorted(shapes.keys() - expected.keys()):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{path} has {extra[0]}{more}, more than its configs say; check the layer counts in its configs."
        )
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise CheckpointError(f"{path}: {name} has shape {list(shape)}, the configs say {list(expected[name])}.")


def _check_tokenizer(
    sources: Mapping[str, tuple[TensorFile, StoredTensor]], files: Mapping[str, Path], folder: Path
) -> None:
    """Raises CheckpointError unless the tokenizer's files agree on the ids of the special tokens that wrap turns and
    images, and the embedding has a row for each id."""
    from bagel.text import WRAPPERS, TextCodec

    try:
        text = TextCodec.from_files(files, folder)
    except BagelError as error:
        raise CheckpointError(str(error)) from None
    rows = sources["language_model.model.embed_tokens.weight"][1].shape[0]
    for token, number in zip(WRAPPERS, (text.bos, text.eos, text.image_start, text.image_end), strict=True):
        if number >= rows:
            raise CheckpointError(
                f"{folder}: its tokenizer gives {token} the id {number}, the embedding has {rows} rows; "
                "copy the tokenizer that belongs to these weights."
            )


def _sizes(files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]], vae: TensorFile) -> ModelSizes:
    """The sizes of the model that the configs describe; `shapes` may lack tensors."""
    channels = vae.tensors["decoder.conv_in.weight"].shape[1]
    llm, vit = (_json(files[name]) for name in CONFIG_FILES)
    extra = _json(files["config.json"]) if "config.json" in files else {}
    try:
        return BagelConfig.from_mappings(llm, vit, extra, shapes, channels, files=files).sizes
    except BagelError as error:
        raise CheckpointError(str(error)) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except BagelError as error:
        raise CheckpointError(str(error)) from None


def _vae(path: Path) -> TensorFile:
    file = TensorFile.open(path)
    unknown = next((n for n in file.tensors if (role := role_of(n)) is None or role.component != "vae"), None)
    latent = file.tensors.get("decoder.conv_in.weight")
    if unknown is not None or latent is None or len(latent.shape) != 4 or "encoder.conv_in.weight" not in file.tensors:
        raise CheckpointError(
            f"{path} is not BAGEL's VAE ({unknown or 'no encoder or decoder'}); take ae.safetensors of the base model."
        )
    return file


def _merged(adapter: Adapter, name: str, file: TensorFile, tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Elements [start, stop) of a weight with its LoRA pair added, as a 1-D fp32 array."""
    import numpy as np

    columns = tensor.numel // max(1, tensor.shape[0])
    first, last = start // columns, -(-stop // columns)
    values = bf16.floats(bf16.stored(file, tensor, first * columns, last * columns), tensor.dtype).astype(np.float64)
    values += adapter.delta(name, first, last).reshape(-1)
    return values[start - first * columns : stop - first * columns].astype(np.float32)
