"""From a folder in the official layout to a model in memory, one tensor at a time.

`ema.safetensors`, `model.safetensors` or shards with an index; the VAE in `vae/` or the root. Modules are built on the
meta device and filled tensor by tensor, so that memory never holds more than the model and one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from bagel.config import EXTRA_FILE, LLM_FILE, VIT_FILE, BagelConfig, read_json, vae_factors
from bagel.errors import BagelError
from bagel.json_file import read_object
from bagel.layout import expected_tensors, role_of
from bagel.model import Bagel
from bagel.vae import AutoEncoder, VAEConfig

WEIGHT_FILES = ("ema.safetensors", "model.safetensors")
INDEX_FILE = "model.safetensors.index.json"
VAE_FILES = ("vae/ae.safetensors", "ae.safetensors")

_LAYER_PART = re.compile(
    r"language_model\.model\.layers\.(\d+)\.(?:self_attn\.|mlp(_moe_gen)?\.)?(\w+?)(_moe_gen)?\.(weight|bias)"
)
_PREFIXES = (
    ("language_model.model.embed_tokens.", "embed_tokens."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.norm.", "norm_und."),
    ("language_model.model.norm_moe_gen.", "norm_gen."),
    ("vit_model.vision_model.embeddings.", "vit."),
    ("vit_model.vision_model.encoder.", "vit."),
    ("vit_model.vision_model.", "vit."),
)


def parameter_path(name: str) -> str:
    """Official name -> path in `Bagel`: `...layers.3.mlp_moe_gen.up_proj.bias` -> `layers.3.gen.up_proj.bias`."""
    if match := _LAYER_PART.fullmatch(name):
        layer, mlp_gen, module, gen, part = match.groups()
        return f"layers.{layer}.{'gen' if mlp_gen or gen else 'und'}.{module}.{part}"
    for official, own in _PREFIXES:
        if name.startswith(official):
            return own + name.removeprefix(official)
    return name


def load_bagel(folder: Path, device: torch.device, dtype: torch.dtype) -> Bagel:
    """The model of a full-precision folder. Raises BagelError naming the first tensor that does not fit."""
    files = weight_files(folder)
    vae_shapes = shapes_of({n: f for f in (vae_file(folder),) for n in tensor_names(f)})
    config = read_config(folder, shapes_of(files), vae_shapes)
    with unfilled():
        model = Bagel(config)
    names = {parameter_path(name): name for name in expected_tensors(config.sizes)}
    fill(model, files, names, device, dtype)
    return model.eval()


def load_vae(
    folder: Path, device: torch.device, file: Path | None = None, config: VAEConfig | None = None
) -> AutoEncoder:
    """The autoencoder, in fp32 whatever it is stored in; `file` and `config` if they are not the folder's."""
    file = file or vae_file(folder)
    files = dict.fromkeys(tensor_names(file), file)
    with unfilled():
        vae = AutoEncoder(config or vae_config(folder, shapes_of(files)))
    fill(vae, files, {name: name for name, _ in vae.named_parameters()}, device, torch.float32)
    return vae.eval()


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules created inside are on the meta device and skip their slow random initialisation."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Replaces an initialiser: returns the tensor unchanged."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:  # called as fill(tensor=...) by torch's dispatcher
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def read_config(
    folder: Path, shapes: dict[str, tuple[int, ...]], vae_shapes: dict[str, tuple[int, ...]]
) -> BagelConfig:
    """Configuration of a folder whose tensors have these shapes (official names)."""
    vae = vae_config(folder, vae_shapes)
    return BagelConfig.from_dir(folder, shapes, vae.z_channels, vae.downsample)


def read_config_files(
    files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]], vae_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[BagelConfig, VAEConfig]:
    """`read_config` of JSON files that may lie in several folders, by name; and the VAE's configuration."""
    llm, vit = read_json(files[LLM_FILE]), read_json(files[VIT_FILE])
    extra = read_json(files[EXTRA_FILE]) if EXTRA_FILE in files else {}
    vae = _vae_config(extra, files.get(EXTRA_FILE, files[LLM_FILE]), vae_shapes)
    return BagelConfig.from_mappings(llm, vit, extra, shapes, vae.z_channels, vae.downsample, files), vae


def vae_config(folder: Path, shapes: dict[str, tuple[int, ...]]) -> VAEConfig:
    """Sizes from shapes; scale and shift from `vae_config` of config.json if it has one, else FLUX's."""
    file = folder / EXTRA_FILE
    return _vae_config(read_json(file) if file.exists() else {}, file, shapes)


def _vae_config(extra: Mapping[str, Any], file: Path, shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    scale, shift = vae_factors(extra, file)
    try:
        return VAEConfig.from_shapes(shapes, scale, shift)
    except ValueError as error:
        raise BagelError(f"{file.parent}: {error} Copy ae.safetensors from the base model.") from None


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file. Raises BagelError if there are no weights or if an index points outside its folder."""
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return dict.fromkeys(tensor_names(folder / name), folder / name)
    index = folder / INDEX_FILE
    if not index.exists():
        raise BagelError(
            f"{folder} has no weights: expected {', '.join(WEIGHT_FILES)} or {INDEX_FILE} with its shards."
        )
    files: dict[str, Path] = {}
    table = read_object(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise BagelError(f"{index} has no weight_map from tensor names to files; copy it again.")
    for tensor, name in table.items():
        file = folder / name
        if folder.resolve() not in file.resolve().parents:
            raise BagelError(f"{index}: {tensor} lies in {name!r}, outside the folder; the index is not trusted.")
        if (role := role_of(tensor)) is None or role.component != "vae":  # a server's index lists the VAE too
            files[tensor] = file
    return files


def vae_file(folder: Path) -> Path:
    for name in VAE_FILES:
        if (folder / name).exists():
            return folder / name
    raise BagelError(f"{folder} has no VAE: expected {' or '.join(VAE_FILES)}; copy it from the base model.")


def tensor_names(file: Path) -> list[str]:
    with _opened(file) as handle:
        return list(handle.keys())


def shapes_of(files: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """Tensor shapes from the files' headers; no data is read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file, names in _by_file(files):
        with _opened(file) as handle:
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    return shapes


def fill(
    model: nn.Module,
    files: dict[str, Path],
    names: dict[str, str],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Puts every stored tensor at its place; `names` are the official names by path of all that must be there.

    Raises BagelError on the first missing, extra or misshapen one.
    """
    expected = dict(model.named_parameters())
    paths = {parameter_path(name): name for name in files}
    if missing := sorted(names[p] for p in expected.keys() - paths.keys()):
        raise BagelError(f"the checkpoint lacks {len(missing)} tensors, first {missing[0]}; it is not complete.")
    if extra := sorted(paths[p] for p in paths.keys() - expected.keys()):
        raise BagelError(f"the checkpoint has {len(extra)} tensors BAGEL does not know, first {extra[0]}.")
    for file, stored in _by_file(files):
        with _opened(file) as handle:
            for name in stored:
                path = parameter_path(name)
                tensor = handle.get_tensor(name)
                if tensor.shape != (wanted := expected[path].shape):
                    raise BagelError(f"{name} has shape {list(tensor.shape)}, the configs ask for {list(wanted)}.")
                put(model, path, nn.Parameter(tensor.to(device, dtype), requires_grad=False))


def put(model: nn.Module, path: str, value: nn.Module | nn.Parameter) -> None:
    """Sets an attribute by its dotted path."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def _by_file(files: dict[str, Path]) -> Iterable[tuple[Path, list[str]]]:
    grouped: dict[Path, list[str]] = {}
    for name, file in files.items():
        grouped.setdefault(file, []).append(name)
    return grouped.items()


def _opened(file: Path):  # type: ignore[no-untyped-def]
    try:
        return safe_open(str(file), framework="pt")
    except FileNotFoundError:
        raise BagelError(f"{file} does not exist, but the index names it; the checkpoint is not complete.") from None
    except SafetensorError as error:
        raise BagelError(f"{file} is not a readable safetensors file ({error}); download it again.") from None
