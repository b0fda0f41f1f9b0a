"""A peft LoRA adapter, merged row by row while the checkpoint is read: W + scale * B @ A.

The product is taken in float64 and rounded once with the weight, so that the merged bf16 words do not depend on how a
BLAS orders its sums or on how many rows are asked for. LoRA of linear layers, of embeddings and of biases, and tensors
saved whole beside it, are merged. Every tensor of the file has one place in the checkpoint, or the file is refused;
what the adapter's config may ask for is said in `adapter_config`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.errors import CheckpointError
from bagel_compress.io import bf16
from bagel_compress.io.safetensors_file import StoredTensor, TensorFile
from bagel_compress.source.adapter_config import CONFIG, AdapterConfig

if TYPE_CHECKING:
    import numpy as np

Sources = Mapping[str, tuple[TensorFile, StoredTensor]]
NormalName = Callable[[str], str | None]
WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG, WEIGHTS)
LARGEST = 1e38  # of the sums that a merge may add; bf16 ends at 3.4e38
_PREFIX = "base_model.model."
# What the model that was trained is of BAGEL: all of it, its language model with or without the head, or its ViT.
_ROOTS = ("", "language_model.", "language_model.model.", "vit_model.")
# With bias "all", peft stores biases of modules_to_save three times: as the others, as trained, and as they were.
_COPIES = (".modules_to_save.", ".original_module.")
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!weight$|bias$)\w+)?(?:\.(weight|bias))?")


@dataclass(frozen=True)
class Adapter:
    """`pairs`: tensor name -> (A of [rank, columns], scale * B of [rows, rank]), float64; `replaced`: whole tensors."""

    name: str  # of its folder, or of its repository where the folder is the Hub's cache
    digest: str  # blake3 of its config and its weights
    scales: tuple[float, float]  # least and largest factor of a pair; (1, 1) where there are only whole tensors
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]
    replaced: dict[str, tuple[TensorFile, StoredTensor]]

    @classmethod
    def open(cls, folder: Path, normal_name: NormalName, sources: Sources) -> Adapter:
        """Reads adapter_config.json and adapter_model.safetensors. Raises CheckpointError if they do not fit.

        `normal_name` gives the official name of a tensor, `sources` are the tensors of the checkpoint.
        """
        config = AdapterConfig.read(folder)
        file = TensorFile.open(folder / WEIGHTS)
        halves, whole = _sorted_out(file, _root(file, normal_name, sources), config)
        _check_copies(file, whole, sources)
        pairs, scales = {}, []
        for (module, name), pair in halves.items():
            pairs[name], scale = _pair(module, name, pair, config, sources[name][1], file)
            scales.append(scale)
        replaced = {name: (file, tensor) for (name, copy), tensor in whole.items() if not copy}
        _check_effect(file, pairs, replaced, sources)
        found = (min(scales), max(scales)) if scales else (1.0, 1.0)
        return cls(_public_name(folder), _digest(folder), found, pairs, replaced)

    def delta(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of what is added to the tensor; float64. A bias has rows of one element."""
        a, b = self.pairs[name]
        delta: np.ndarray = b[first:last] @ a
        return delta


@dataclass(frozen=True)
class _Root:
    """Where in BAGEL the model lies that was trained."""

    path: str
    normal_name: NormalName
    sources: Sources

    def official(self, module: str, leaf: str) -> str | None:
        """Official name of a module's weight or bias, if the checkpoint has it."""
        name = self.normal_name(f"{self.path}{module}.{leaf}")
        return name if name in self.sources else None


def _root(file: TensorFile, normal_name: NormalName, sources: Sources) -> _Root:
    """The root under which every tensor of the file has a place. Raises CheckpointError naming one that has none."""
    strangers = []
    for path in _ROOTS:
        root = _Root(path, normal_name, sources)
        lost = [stored for stored in file.tensors if _place(stored, root) is None]
        if not lost:
            return root
        strangers.append(lost)
    first = min(strangers, key=len)[0]
    raise CheckpointError(f"{file.path} adapts {first}, which this checkpoint does not have.")


def _place(stored: str, root: _Root) -> tuple[str, str, str] | None:
    """(module as trained, half, official name) of a stored tensor; the half is empty for a whole tensor.

    Halves are A, B, bias (what is added to the bias), embedding_A and embedding_B.
    """
    stored = stored.removeprefix(_PREFIX)
    match = _LORA.fullmatch(stored)
    if match is None:
        for segment in (".base_layer.", *_COPIES):
            stored = stored.replace(segment, ".")
        module, _, leaf = stored.rpartition(".")
        name = root.official(module, leaf) if leaf in ("weight", "bias", "pos_embed") else None
        return None if name is None else (module, "", name)
    module, embedding, half, leaf = match.groups()
    if (embedding, leaf) not in ((None, "weight"), (None, "bias"), ("embedding_", None)) or (leaf, half) == (
        "bias",
        "A",
    ):
        return None
    name = root.official(module, "bias" if leaf == "bias" else "weight")
    return None if name is None else (module, "bias" if leaf == "bias" else f"{embedding or ''}{half}", name)


_Halves = dict[tuple[str, str], dict[str, StoredTensor]]
_Whole = dict[tuple[str, str], StoredTensor]  # by official name and the segment of `_COPIES`, empty for the trained


def _sorted_out(file: TensorFile, root: _Root, config: AdapterConfig) -> tuple[_Halves, _Whole]:
    """(module, name) -> halves by kind, and the whole tensors. Raises CheckpointError on what peft would not use."""
    halves: _Halves = {}
    whole: _Whole = {}
    for stored, tensor in file.tensors.items():
        if tensor.dtype not in bf16.WIDTHS:
            raise CheckpointError(f"{file.path}: {stored} is {tensor.dtype}, expected BF16, F16 or F32.")
        place = _place(stored, root)
        assert place is not None, stored  # `_root` found one for each
        module, half, name = place
        if half and not config.targets(module):
            raise CheckpointError(
                f"{file.path} has a LoRA of {module}, which target_modules of {CONFIG} does not name; save it again."
            )
        taken: dict[Any, StoredTensor] = halves.setdefault((module, name), {}) if half else whole
        key = half or (name, next((segment for segment in _COPIES if segment in stored), ""))
        if key in taken:
            raise CheckpointError(f"{file.path} adapts {name} twice ({stored}); give a file of one adapter.")
        taken[key] = tensor
    return halves, whole


def _check_copies(file: TensorFile, whole: _Whole, sources: Sources) -> None:
    """Raises CheckpointError if a copy that peft keeps beside a trained tensor is not the copy that it should be."""
    trained, untrained = _COPIES
    for (name, copy), tensor in whole.items():
        original = {trained: whole.get((name, "")), untrained: sources[name][1]}.get(copy, tensor)
        place = sources[name][0] if copy == untrained else file
        if original is None or not _equal((file, tensor), (place, original)):
            raise CheckpointError(f"{file.path} holds {name} under {copy.strip('.')} with other values; save it again.")


def _pair(
    module: str,
    name: str,
    halves: Mapping[str, StoredTensor],
    config: AdapterConfig,
    weight: StoredTensor,
    file: TensorFile,
) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """A and scale * B of one tensor, and the scale."""
    import numpy as np

    kinds = {kind.removeprefix("embedding_") for kind in halves}
    values = {kind: _values(file, module, tensor) for kind, tensor in halves.items()}
    rank: int | None = None
    if kinds == {"bias"}:  # of lora_B: scaled as the pair is
        a, b = np.ones((1, 1)), values["bias"].reshape(-1, 1)
    elif kinds == {"A", "B"} and len(halves) == 2:
        embedding = "embedding_A" in values
        a, b = (values["embedding_B"].T, values["embedding_A"].T) if embedding else (values["A"], values["B"])
        rank = a.shape[0]
    else:
        raise CheckpointError(f"{file.path} has only lora_{min(halves)} for {module}; expected lora_A and lora_B.")
    rows, columns = weight.shape[0], weight.numel // max(1, weight.shape[0])
    if len(weight.shape) > 2 or (b.shape[0], a.shape[1]) != (rows, columns) or a.shape[0] != b.shape[1]:
        found = f"{list(b.shape)} x {list(a.shape)}"
        raise CheckpointError(f"{file.path}: the LoRA of {name} is {found}, the weight is {list(weight.shape)}.")
    scale = config.scale(module, rank)
    b = b * scale
    if not np.abs(a).max(initial=0.0) * np.abs(b).max(initial=0.0) * a.shape[0] < LARGEST:
        raise CheckpointError(f"{file.path}: the LoRA of {name} goes beyond what bf16 holds (scale {scale:g}).")
    return (a, b), scale


def _values(file: TensorFile, module: str, tensor: StoredTensor) -> np.ndarray:
    """Stored values as float64, in their shape. Raises CheckpointError on NaN and infinity."""
    import numpy as np

    values = bf16.floats(bf16.stored(file, tensor, 0, tensor.numel), tensor.dtype)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{file.path}: the LoRA of {module} holds values that are not finite; train it again.")
    if len(tensor.shape) > 2:
        raise CheckpointError(f"{file.path}: the LoRA of {module} has shape {list(tensor.shape)}, expected a matrix.")
    return values.astype(np.float64).reshape(tensor.shape)


def _check_effect(
    file: TensorFile, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], replaced: Sources, sources: Sources
) -> None:
    """Raises CheckpointError if the adapter leaves every weight as it is: it was not trained, or lost its values."""
    if any((a.any(1) & b.any(0)).any() for a, b in pairs.values()):
        return
    if any(not _equal(replaced[name], sources[name]) for name in replaced):
        return
    raise CheckpointError(f"{file.path} changes no weight; give a trained adapter, or leave --lora away.")


def _equal(one: tuple[TensorFile, StoredTensor], other: tuple[TensorFile, StoredTensor]) -> bool:
    if one[1].shape != other[1].shape:
        return False
    first, second = (bf16.floats(bf16.stored(f, t, 0, t.numel), t.dtype) for f, t in (one, other))
    return bool((bf16.rounded(first) == bf16.rounded(second)).all())


def _public_name(folder: Path) -> str:
    """`owner/name` of a snapshot in the Hub's cache, else the folder's own name."""
    path = folder.resolve()
    repository = next((part for part in path.parts if part.startswith("models--")), None)
    return path.name if repository is None else repository.removeprefix("models--").replace("--", "/", 1)


def _digest(folder: Path) -> str:
    from blake3 import blake3

    total = blake3()
    for name in ADAPTER_FILES:
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()
