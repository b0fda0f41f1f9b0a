"""DeviceMap: assigns the layers and parts of a model to several devices.

A device has consecutive layers and their caches, so that hidden rows are copied only once per device. Parts that wait
in host memory are copied to their device for every use and freed after it (offload.py). `budgets.plan_devices` plans a
map from the bytes of a build.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from bagel_compress.errors import TargetError

if TYPE_CHECKING:
    import torch

    from bagel.model import Places

DeviceChoice: TypeAlias = "str | torch.device | DeviceMap"  # what a model is opened on

_GROUP = re.compile(r"layers\.\d+|embed_tokens|lm_head|vae(?=\.|$)|(vit|connector|vit_pos_embed)(?=\.|$)")


@dataclass(frozen=True, slots=True)
class DeviceMap:
    """The device of each layer and part, by torch's names. `waiting` are the groups (`group_of`) in host memory."""

    layers: tuple[str, ...]
    home: str  # embeddings, norms, bridges
    vit: str  # with its connector and position table
    head: str
    vae: str
    waiting: frozenset[str] = frozenset()

    def device_of(self, group: str) -> torch.device:
        """The device on which a group computes."""
        import torch

        kind, _, index = group.partition(".")
        parts = {"vit": self.vit, "lm_head": self.head, "vae": self.vae}
        return torch.device(self.layers[int(index)] if kind == "layers" else parts.get(kind, self.home))

    def lies_on(self, path: str) -> torch.device:
        """The device to load a module's weights to, by its path in `bagel.Bagel`; the VAE is "vae"."""
        import torch

        group = group_of(path)
        return torch.device("cpu") if group in self.waiting else self.device_of(group)

    def places(self) -> Places:
        """The map in the form that the model uses."""
        from bagel.model import Places

        layers = tuple(self.device_of(f"layers.{index}") for index in range(len(self.layers)))
        return Places(self.device_of("home"), layers, self.device_of("vit"), self.device_of("lm_head"))


def device_named(name: str) -> torch.device:
    """One device of this machine by torch's name. Raises TargetError if there is no such device, or none that works."""
    import torch

    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):  # ValueError: a NUL or a lone surrogate in the name
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise TargetError(f"--device {name!r} is no device; expected auto, cpu, cuda, cuda:N or cuda:N,cuda:M.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise TargetError(f"--device {name}: this machine has no Metal device that torch can use; use --device cpu.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TargetError(f"--device {name}: this machine has no CUDA device that torch can use; use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise TargetError(
            f"--device {name}: this machine has {count} CUDA devices; expected cuda:0 to cuda:{count - 1}."
        )
    return device


def group_of(path: str) -> str:
    """The group of a module: "layers.N", "embed_tokens", "lm_head", "vit" (with connector and positions), "vae" or
    "home" (all others)."""
    match = _GROUP.match(path)
    return "home" if match is None else "vit" if match[1] else match[0]
