"""Turns the command line's --device into one device, or into a map over several of this machine's GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bagel_compress.budgets.fake_model import BuildOutline
from bagel_compress.budgets.plan_devices import SLACK, Gpu, held_bytes, plan_map
from bagel_compress.budgets.planned_build import planned_build
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.errors import TargetError
from bagel_compress.run.device_map import DeviceChoice, device_named

# What one GPU must have free beside the weights to be taken without planning: more than any phase takes (the
# scratch of a decoder and the VAE's at 1024 x 1024, 4.8 GB) and long contexts.
AMPLE = 8_000_000_000


def choose_device(device: str, model: str | Path, say: Callable[[str], None] = lambda text: None) -> DeviceChoice:
    """The device of "auto", "cpu", "cuda" or "cuda:1", or a map over GPUs named with commas between them.

    `say` is called with the text of the map, if there is one. Raises TargetError on a device that is not there.
    "auto" is the first CUDA device if the model has ample room there, else a map over all of them, else the CPU.
    """
    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    if device == "auto":
        gpus = [_gpu(f"cuda:{index}") for index in range(torch.cuda.device_count())]
        build = build_of(Path(model))
        if sum(held_bytes(build).values()) + AMPLE <= gpus[0].room:
            return "cuda"
    elif "," in device:
        gpus, build = named(device.split(",")), build_of(Path(model))
    else:
        return one_device(device)
    plan = plan_map(build, gpus)
    say(plan.table())
    return plan.places


def build_of(folder: Path) -> BuildOutline:
    """The outline of an artifact's folder, or of a checkpoint's as it is loaded in bf16."""
    if (folder / MANIFEST).exists():
        return BuildOutline.of_artifact(Artifact.open(folder))
    return planned_build("raw", str(folder))


def named(names: Sequence[str]) -> list[Gpu]:
    """The GPUs with these names (cuda:0, cuda:1). Raises TargetError on another device or a name given twice."""
    for name in names:
        if not name.startswith("cuda:") or names.count(name) > 1:
            raise TargetError(f"--device {','.join(names)}: {name!r} is no GPU of its own; expected cuda:0,cuda:1,...")
    return [_gpu(one_device(name)) for name in names]


def one_device(name: str) -> str:
    """The name of one device; "auto" is CUDA where there is one. Raises TargetError if it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if "," in name:
        raise TargetError(f"--device {name}: fp32 and --target take one device; give one of them.")
    device_named(name)
    return name


def _gpu(name: str) -> Gpu:
    """A GPU of this machine and its free bytes now. Asking creates a CUDA context, which counts as used."""
    free, _ = torch.cuda.mem_get_info(name)
    return Gpu(name, torch.cuda.get_device_name(name), free - SLACK)
