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
from bagel_compress.run.target import Workload

# Bytes that a GPU must have free beside the weights to be used without a device map: more than any phase takes
# (decoding scratch and the VAE at 1024 x 1024 need 4.8 GB), so that long contexts fit too.
HEADROOM = 8_000_000_000


def choose_device(device: str, model: str | Path, say: Callable[[str], None] = lambda text: None) -> DeviceChoice:
    """The device for "auto", "cpu", "cuda" or "cuda:1"; a device map for several GPUs, "cuda:0,cuda:1".

    "auto" is the CPU if there is no GPU, the first GPU if `model` and HEADROOM fit there, else a map over all GPUs.
    `say` is called with the map as text, if there is one. Raises TargetError if a device does not exist.
    """
    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    if device == "auto":
        gpus = [_gpu(f"cuda:{index}") for index in range(torch.cuda.device_count())]
        build = outline_of(Path(model))
        if sum(held_bytes(build).values()) + HEADROOM <= gpus[0].room:
            return "cuda"
    elif "," in device:
        gpus, build = gpus_named(device.split(",")), outline_of(Path(model))
    else:
        return one_device(device)
    largest = build.config.image_stride * build.config.max_latent_size
    sizes = Workload()
    if largest < max(sizes.image):  # a small model: BAGEL-nano
        sizes = Workload(image=(largest, largest), input_image=(largest, largest))
    plan = plan_map(build, gpus, sizes)
    say(plan.table())
    return plan.places


def outline_of(folder: Path) -> BuildOutline:
    """The outline of the artifact in a folder; of a checkpoint, as it is when loaded in bf16."""
    if (folder / MANIFEST).exists():
        return BuildOutline.of_artifact(Artifact.open(folder))
    return planned_build("raw", str(folder))


def gpus_named(names: Sequence[str]) -> list[Gpu]:
    """The GPUs with these names (cuda:0, cuda:1). Raises TargetError on any other device and on a repeated name."""
    for name in names:
        if not name.startswith("cuda:") or names.count(name) > 1:
            raise TargetError(f"--device {','.join(names)}: {name!r} is no GPU of its own; expected cuda:0,cuda:1,...")
    return [_gpu(one_device(name)) for name in names]


def one_device(name: str) -> str:
    """The name of one device; "auto" is "cuda" if there is a GPU, else "cpu". Raises TargetError if it is absent."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if "," in name:
        raise TargetError(f"--device {name}: fp32 and --target take one device; give one of them.")
    device_named(name)
    return name


def _gpu(name: str) -> Gpu:
    """A GPU of this machine and its free bytes. The query creates a CUDA context, which then counts as used."""
    free, _ = torch.cuda.mem_get_info(name)
    return Gpu(name, torch.cuda.get_device_name(name), free - SLACK)
