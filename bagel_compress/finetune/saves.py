"""What a run leaves: a folder NNNNNNN per save, as the official training does, and the newest states to go on from.

OUT/config.json                 the run's config; a run that goes on must have the same
OUT/metrics.jsonl               one line per step
OUT/damaged.txt                 rows that were skipped, and why
OUT/0000500/model.safetensors   the weights, bf16, with configs, tokenizer and VAE beside them   (all weights)
OUT/0000500/ema.safetensors     their moving average: what `compress` and the sampler open first
OUT/0000500/adapter_*           the adapter as peft reads it; its average in ema/                (adapters)
OUT/0000500/state/              weights, average and moments, sharded safetensors of torch.distributed.checkpoint
OUT/0000500/state.json          written last: the save is complete
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bagel_compress.errors import FinetuneError
from bagel_compress.finetune.processes import Processes, whole
from bagel_compress.io.atomic import atomic_file, write_atomic
from bagel_compress.io.safetensors_file import lay_out
from bagel_compress.io.tensor_spec import PartSpec

STATE, STATE_FILE, CONFIG_FILE, METRICS_FILE = "state", "state.json", "config.json", "metrics.jsonl"
DAMAGE_FILE = "damaged.txt"
_NUMBER = re.compile(r"\d{7,}")


def folder_of(out: Path, step: int) -> Path:
    return out / f"{step:07d}"


def newest(out: Path) -> Path | None:
    """The last complete save that keeps its state, or None."""
    found = [p.parent for p in out.glob(f"*/{STATE_FILE}") if _NUMBER.fullmatch(p.parent.name)]
    found = [folder for folder in found if (folder / STATE).is_dir()]
    return max(found, key=lambda folder: int(folder.name), default=None)


def read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise FinetuneError(f"{folder / STATE_FILE} cannot be read ({fault}); remove {folder}.") from None
    if not isinstance(state, dict):
        raise FinetuneError(f"{folder / STATE_FILE} is no JSON object; remove {folder}.")
    return state


def save_state(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Each process writes its own part."""
    import torch.distributed.checkpoint as dcp

    path = folder / STATE
    if processes.first:
        shutil.rmtree(path, ignore_errors=True)
    processes.wait()
    writer = dcp.HuggingFaceStorageWriter(path=str(path), save_distributed=True)
    with _one_process_is_meant():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=processes.mesh is None)


def load_state(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Into the given tensors. Raises FinetuneError if the files do not hold them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    reader = dcp.HuggingFaceStorageReader(str(folder / STATE))
    try:
        with _one_process_is_meant():
            dcp.load(dict(tensors), storage_reader=reader, no_dist=processes.mesh is None)
    except (CheckpointException, OSError, ValueError, KeyError, RuntimeError) as fault:
        reason = " ".join(str(fault).split())[:300]
        raise FinetuneError(f"{folder / STATE} cannot be read ({reason}); remove {folder} to go on earlier.") from None


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """torch warns where there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def save_weights(path: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """One safetensors file in bf16; a sharded tensor is gathered alone, so that memory holds one at a time."""
    parts = {name: PartSpec("BF16", tuple(t.shape)) for name, t in tensors.items()}
    header, offsets = lay_out(parts)
    names = sorted(offsets, key=offsets.__getitem__)
    if not processes.first:
        for name in names:
            whole(tensors[name])
        return
    with atomic_file(path) as file:
        file.write(header)
        for name in names:
            values = whole(tensors[name].detach()).to("cpu", torch.bfloat16).contiguous()
            file.write(values.view(-1).view(torch.uint8).numpy().data)


def copy_beside(folder: Path, files: Mapping[str, Path]) -> None:
    """Configs, tokenizer and VAE, so that the folder opens by itself."""
    for name, source in files.items():
        with atomic_file(folder / name) as out, source.open("rb") as given:
            shutil.copyfileobj(given, out)


def drop_old_states(out: Path, keep: int) -> None:
    folders = sorted(p.parent for p in out.glob(f"*/{STATE_FILE}") if (p.parent / STATE).is_dir())
    for folder in folders[:-keep]:
        shutil.rmtree(folder / STATE)


class Metrics:
    """metrics.jsonl, and TensorBoard's event files beside it if asked."""

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        """Lines of steps after `step`, which a killed run had written, are dropped."""
        self._path = out / METRICS_FILE
        kept = [line for line in _lines(self._path) if line["step"] <= step]
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._board = _board(out) if tensorboard else None

    def add(self, values: Mapping[str, float]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, int(values["step"]))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """Whole lines of the file, if there is one; a kill may have cut the last."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _board(out: Path) -> Any:
    from bagel_compress.errors import MissingExtraError

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError(
            "tensorboard: true needs the package tensorboard; pip install 'bagel-compress[finetune]'."
        ) from None
    return SummaryWriter(str(out))  # type: ignore[no-untyped-call]
