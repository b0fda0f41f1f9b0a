"""A peft LoRA adapter, merged row by row while the checkpoint is read: W + scale * B @ A.

The product and the sum are computed in float64 and rounded to bf16 once, so that the merged values do not depend on the
order in which a BLAS adds or on how many rows are read at a time. LoRA of linear layers, embeddings and biases is
merged; tensors that peft saved in full replace those of the checkpoint. A file with a tensor that matches none of the
checkpoint's is refused. `adapter_config` says which settings of an adapter are supported.
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
LARGEST = 1e38  # bound on the elements of scale * B @ A; the largest bf16 number is 3.4e38
_PREFIX = "base_model.model."
# Where the trained model lies in BAGEL: all of it, its language model with or without the head, or its ViT.
_ROOTS = ("", "language_model.", "language_model.model.", "vit_model.")
# With bias "all", peft stores the bias of a module in modules_to_save three times: under its plain name, and under
# these two segments the trained and the original values.
_COPIES = (".modules_to_save.", ".original_module.")
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!weight$|bias$)\w+)?(?:\.(weight|bias))?")


@dataclass(frozen=True)
class Adapter:
    """An opened adapter.

    `pairs`: official tensor name -> (A of [rank, columns], scale * B of [rows, rank]), both float64. `replaced`:
    official tensor name -> the tensor that replaces the checkpoint's.
    """

    name: str  # of the adapter's folder, or of its repository where the folder is the Hub's cache
    digest: str  # blake3 of the adapter's config and weights
    scales: tuple[float, float]  # smallest and largest scale of a pair; (1, 1) if the file has no pairs
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]
    replaced: dict[str, tuple[TensorFile, StoredTensor]]

    @classmethod
    def open(cls, folder: Path, normal_name: NormalName, sources: Sources) -> Adapter:
        """Reads adapter_config.json and adapter_model.safetensors.

        `normal_name` gives the official name of a tensor, `sources` are the tensors of the checkpoint. Raises
        CheckpointError if the adapter cannot be merged into this checkpoint.
        """
        config = AdapterConfig.read(folder)
        file = TensorFile.open(folder / WEIGHTS)
        halves, whole = _halves_and_whole(file, _root(file, normal_name, sources), config)
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
        """Rows [first, last) of scale * B @ A, float64 [rows, columns]. A bias counts as a matrix of one column."""
        a, b = self.pairs[name]
        delta: np.ndarray = b[first:last] @ a
        return delta


@dataclass(frozen=True)
class _Root:
    """The part of BAGEL that was trained: the prefix of its modules' names, and the checkpoint that has them."""

    path: str
    normal_name: NormalName
    sources: Sources

    def official(self, module: str, leaf: str) -> str | None:
        """Official name of a module's weight or bias; None if the checkpoint has no such tensor."""
        name = self.normal_name(f"{self.path}{module}.{leaf}")
        return name if name in self.sources else None


def _root(file: TensorFile, normal_name: NormalName, sources: Sources) -> _Root:
    """The first of `_ROOTS` under which every tensor of the file matches one of the checkpoint's.

    Raises CheckpointError, naming a tensor without a match, if there is no such root.
    """
    unmatched_by_root = []
    for path in _ROOTS:
        root = _Root(path, normal_name, sources)
        unmatched = [stored for stored in file.tensors if _place(stored, root) is None]
        if not unmatched:
            return root
        unmatched_by_root.append(unmatched)
    first = min(unmatched_by_root, key=len)[0]
    raise CheckpointError(f"{file.path} adapts {first}, which this checkpoint does not have.")


def _place(stored: str, root: _Root) -> tuple[str, str, str] | None:
    """(module name in the trained model, half, official name) of a stored tensor; None if the checkpoint lacks it.

    The half is A, B, bias (added to the module's bias), embedding_A or embedding_B; empty for a tensor saved in full.
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
# By official name and segment of `_COPIES`; the segment is empty for a tensor under its plain name.
_Whole = dict[tuple[str, str], StoredTensor]


def _halves_and_whole(file: TensorFile, root: _Root, config: AdapterConfig) -> tuple[_Halves, _Whole]:
    """The LoRA halves by (module, official name) and kind, and the tensors saved in full.

    Raises CheckpointError on a tensor that peft would not load, a duplicate, or a dtype that is no float.
    """
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
    """Raises CheckpointError if a copy that peft stored differs from the tensor that it should equal."""
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
    """((A, scale * B), scale) of one tensor; float64 arrays. Raises CheckpointError on wrong shapes or values."""
    import numpy as np

    kinds = {kind.removeprefix("embedding_") for kind in halves}
    values = {kind: _values(file, module, tensor) for kind, tensor in halves.items()}
    rank: int | None = None
    if kinds == {"bias"}:  # the bias of lora_B, which peft scales like the product
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
    """Raises CheckpointError if the adapter changes no weight, as one that was not trained or saved badly does."""
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
    """`owner/name` if the folder is a snapshot in the Hub's cache, else the folder's own name."""
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
