"""Loads an artifact as a sampler, with the codecs' run-time modules in the model.

Weights are copied from the mapped file directly to the device, one unit at a time, so memory never holds the model
twice. Linear weights stay in their stored form and are multiplied by their codec's module; other tensors are decoded
once. A census lists what each module holds; a compressed weight that is not used in compressed form is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel.layout import official_role
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import EXPORT_MANIFEST, MANIFEST
from bagel_compress.codecs.base import Codec, Unit
from bagel_compress.codecs.raw import Raw
from bagel_compress.errors import ArtifactError, CheckpointError
from bagel_compress.io.hub_client import parse_repo_id
from bagel_compress.io.safe_paths import exists
from bagel_compress.run.device_map import DeviceChoice, DeviceMap, device_named
from bagel_compress.source.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from bagel.config import BagelConfig
    from bagel.model import Bagel
    from bagel.sampler import Sampler

VAE = "ae.safetensors"


@dataclass(frozen=True, slots=True)
class CensusRow:
    """One linear or stored tensor of a loaded model: bytes on the device, stored dtype, and how it is computed."""

    name: str  # official tensor name
    codec: str
    stored: str
    compute: str
    nbytes: int


def open_model(
    path: str | Path,
    device: DeviceChoice = "cpu",
    dtype: torch.dtype | None = None,
    check: Callable[[BagelConfig], object] | None = None,
    trust: bool = False,
) -> Sampler:
    """Opens a full-precision checkpoint folder, an artifact folder or a Hub id as a sampler.

    `device` may be a map over several devices. `dtype` None is bf16, the models' own. With another dtype, an artifact's
    weights are decoded to that dtype and the run-time modules are not used. `check` is called with the model's
    configuration before weights are read, and may raise. With `trust`, what is read of an artifact is not compared with
    its manifest. Raises CheckpointError, ArtifactError or BagelError.
    """
    folder = Path(path)
    if not exists(folder):
        folder = downloaded(str(path))
    if (folder / EXPORT_MANIFEST).exists():
        raise CheckpointError(f"{path} is an export; open it with bagel_compress.exporting.ort_sampler.open_onnx.")
    if (folder / MANIFEST).exists():
        return load(Artifact.open(folder, trust=trust), device, dtype, check)
    return load_checkpoint(Checkpoint.open(folder), device, dtype, check)


def load_checkpoint(
    checkpoint: Checkpoint,
    device: DeviceChoice = "cpu",
    dtype: torch.dtype | None = None,
    check: Callable[[BagelConfig], object] | None = None,
) -> Sampler:
    """The sampler of an opened checkpoint, whatever its layout, with its adapter and base."""
    import torch

    from bagel.loading import load_vae, parameter_path, put, read_config_files, unfilled
    from bagel.model import Bagel
    from bagel.sampler import Sampler
    from bagel.text import TextCodec

    lies_on, dtype = _lies_on(device), dtype or torch.bfloat16
    vae_shapes = {name: tensor.shape for name, tensor in checkpoint.vae.tensors.items()}
    config, vae_config = read_config_files(checkpoint.files, checkpoint.shapes, vae_shapes)
    if check is not None:
        check(config)
    with unfilled():
        bagel = Bagel(config)
    for spec in checkpoint.specs:
        values = checkpoint.read(spec, 0, spec.numel).reshape(spec.shape)
        path = parameter_path(spec.name)
        put(bagel, path, _parameter(values.to(lies_on(path), dtype, copy=True)))
    vae_file = checkpoint.files[VAE]
    vae = load_vae(vae_file.parent, lies_on("vae"), vae_file, vae_config)
    text = TextCodec.from_files(checkpoint.files, checkpoint.files["llm_config.json"].parent)
    return _spread(Sampler(bagel.eval(), vae, text), device)


def load(
    artifact: Artifact,
    device: DeviceChoice = "cpu",
    dtype: torch.dtype | None = None,
    check: Callable[[BagelConfig], object] | None = None,
) -> Sampler:
    """The sampler of an artifact. See `open_model` for `device`, `dtype` and `check`."""
    from bagel.loading import load_vae, read_config_files, shapes_of, tensor_names, unfilled
    from bagel.model import Bagel
    from bagel.sampler import Sampler
    from bagel.text import TextCodec

    lies_on = _lies_on(device)
    shapes = {spec.name: spec.shape for unit in artifact.units() for spec in unit.specs}
    files = artifact.model_files
    vae_shapes = shapes_of(dict.fromkeys(tensor_names(files[VAE]), files[VAE]))
    config, vae_config = read_config_files(files, shapes, vae_shapes)
    if check is not None:
        check(config)
    with unfilled():
        bagel = Bagel(config)
    _fill(bagel, artifact, lies_on, dtype)
    vae = load_vae(artifact.path, lies_on("vae"), files[VAE], vae_config)
    sampler = Sampler(bagel.eval(), vae, TextCodec.from_files(files, artifact.path))
    if dtype is None:
        census(sampler.bagel, artifact)
    return _spread(sampler, device)


def census(bagel: Bagel, artifact: Artifact) -> list[CensusRow]:
    """A row for every tensor of the loaded model. Raises ArtifactError if a compressed linear is not in use."""
    rows = []
    for name, entry in artifact.manifest.units.items():
        for tensor in entry.tensors:
            module = bagel.get_submodule(_module_path(tensor))
            row = _row(tensor, module)
            if _is_linear(tensor) and row.codec != entry.codec.format:
                raise ArtifactError(
                    f"{tensor} is stored as {entry.codec.format} (unit {name}) but runs as {row.codec} {row.stored};"
                    " this model would not have the size it promises."
                )
            rows.append(row)
    return rows


def _row(tensor: str, module: Any) -> CensusRow:
    leaf = tensor.rpartition(".")[2]
    if leaf == "weight" and hasattr(module, "describe"):
        about = module.describe()
        return CensusRow(tensor, about["codec"], about["stored"], about["compute"], module.stored_bytes)
    value = getattr(module, leaf)
    dtype = str(value.dtype).removeprefix("torch.")
    return CensusRow(tensor, Raw.name(), dtype, dtype, value.nbytes)


def _lies_on(device: DeviceChoice) -> Callable[[str], torch.device]:
    """A function from the path of a module to the device that its weights are loaded to."""
    if isinstance(device, DeviceMap):
        return device.lies_on
    everywhere = device_named(device) if isinstance(device, str) else device
    return lambda path: everywhere


def _spread(sampler: Sampler, device: DeviceChoice) -> Sampler:
    """The sampler; with a device map, its model computes each layer on the map's device."""
    if isinstance(device, DeviceMap):
        from bagel_compress.run.offload import wait

        sampler.bagel.places = device.places()
        if device.waiting:
            wait(sampler, device)
    return sampler


def _fill(bagel: Bagel, artifact: Artifact, lies_on: Callable[[str], torch.device], dtype: torch.dtype | None) -> None:
    """Loads the weights: biases first, because a linear's module is made with its bias; then units in shard order."""
    from bagel.loading import parameter_path, put

    biases: dict[str, torch.Tensor] = {}
    for name, entry in artifact.manifest.units.items():
        for tensor in entry.tensors:
            if tensor.endswith(".bias"):
                value = artifact.decode(name)[tensor]
                biases[tensor.removesuffix("bias") + "weight"] = value.to(lies_on(_module_path(tensor)), dtype)
    expected = dict(bagel.named_parameters())
    for name, entry in artifact.manifest.units.items():
        _check_shapes(artifact, name, {t: tuple(expected[parameter_path(t)].shape) for t in entry.tensors})
        device = lies_on(_module_path(next(iter(entry.tensors))))
        parts = {part: value.to(device) for part, value in artifact.parts(name).items()}
        if dtype is None and (modules := _modules(artifact, name, parts, biases)):
            for tensor, module in modules.items():
                put(bagel, _module_path(tensor), module)
            continue
        for tensor, value in entry.codec.decode(artifact.unit(name), parts).items():
            if not hasattr(bagel.get_submodule(_module_path(tensor)), "describe"):
                put(bagel, parameter_path(tensor), _parameter(value.to(device, dtype)))


def runs_coded(codec: Codec, unit: Unit) -> bool:
    """Whether a unit's linears compute from the stored form; a unit with other tensors is decoded when it is loaded."""
    return not codec.stored_as_is and all(_is_linear(spec.name) for spec in unit.specs)


def _modules(artifact: Artifact, name: str, parts: Mapping[str, Any], biases: Mapping[str, Any]) -> dict[str, Any]:
    """Run-time modules, by tensor, of a unit that stays in its stored form; empty if it has to be decoded."""
    unit, codec = artifact.unit(name), artifact.codec(name)
    if runs_coded(codec, unit):
        return codec.linears(unit, parts, biases)
    if [official_role(spec.name).kind for spec in unit.specs] == ["embedding"]:
        table = codec.embedding(unit, parts)
        return {} if table is None else {unit.specs[0].name: table}
    return {}


def _check_shapes(artifact: Artifact, name: str, wanted: Mapping[str, tuple[int, ...]]) -> None:
    for tensor, entry in artifact.manifest.units[name].tensors.items():
        if entry.shape != wanted[tensor]:
            raise ArtifactError(
                f"{artifact.path}: {tensor} has shape {list(entry.shape)}, its configs ask for {list(wanted[tensor])}."
            )


def _parameter(value: torch.Tensor) -> Any:
    import torch

    return torch.nn.Parameter(value, requires_grad=False)


def _module_path(tensor: str) -> str:
    from bagel.loading import parameter_path

    return parameter_path(tensor).rpartition(".")[0]


def _is_linear(tensor: str) -> bool:
    return official_role(tensor).kind in ("linear", "head")


def downloaded(name: str) -> Path:
    """The folder of a published artifact or export, or of a full-precision repository.

    Raises CheckpointError if `name` is no repository id, HubError if the Hub has no such repository or is not reached.
    """
    if parse_repo_id(name) is None:
        raise CheckpointError(f"{name} is neither a folder nor a Hub id (owner/name or owner/name@revision).")
    from bagel_compress.run.fetch import fetch_model

    return fetch_model(name)
