"""Plans a device map: which layers and parts of a build go to which GPU, and which wait in host memory.

Weights are counted as they are loaded: stored codes for linears, bf16 for units that are decoded at loading, fp32 for
the VAE. Caches and activations of every phase come from the memory prediction; each GPU needs the caches of its own
layers and the activations of the phases that it takes part in. The plan uses as few GPUs as hold everything, in the
order in which the user named them, and divides the layers so that the fullest GPU keeps as much free memory as
possible. If not everything fits, parts wait in host memory, in this order: the embedding table (only looked-up rows are
copied), the VAE, the ViT, the head, then layers from the last on, which compute on the last GPU and are copied there
one by one. Units of a codec that is not `movable` cannot wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from bagel.loading import parameter_path
from bagel.vae import AutoEncoder
from bagel_compress.budgets.fake_model import BuildOutline
from bagel_compress.budgets.memory_tracker import CUDA_ROUNDING
from bagel_compress.budgets.predict import ACTIVATIONS, CACHES, predict
from bagel_compress.budgets.recommend import recipes_for
from bagel_compress.errors import TargetError
from bagel_compress.run.device_map import DeviceMap, group_of
from bagel_compress.run.target import GIB, MIB, Device, Target, Workload

FREE_PARTS = ("vit", "lm_head", "vae")  # parts that may be on any GPU; "embed_tokens" and "home" are on the first
WAITING_ORDER = ("embed_tokens", "vae", "vit", "lm_head")  # parts that wait in host memory before any layer does
SLACK = 256 * MIB  # bytes of each GPU that are left for workspaces of cuBLAS and cuDNN, and for fragmentation


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that a map may use."""

    device: str  # "cuda:0"
    name: str
    room: int  # bytes that weights, caches and activations may take


@dataclass(frozen=True, slots=True)
class Load:
    """The layers and parts on a GPU, and the bytes that they take in its worst phase."""

    gpu: Gpu
    layers: tuple[int, ...]
    parts: tuple[str, ...]
    weights: int
    caches: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.activations


@dataclass(frozen=True, slots=True)
class MapPlan:
    """A device map with the load of each GPU under it."""

    places: DeviceMap
    loads: tuple[Load, ...]
    host: int  # bytes of weights in host memory

    def table(self) -> str:
        """The map as text, in GiB."""
        lines = [f"{'device':<10}{'layers':<9}{'weights':>9}{'caches':>9}{'activations':>13}{'room':>8}  parts"]
        for load in self.loads:
            numbers = (load.weights, load.caches, load.activations, load.gpu.room)
            weights, caches, activations, room = (f"{n / GIB:.2f}" for n in numbers)
            lines.append(
                f"{load.gpu.device:<10}{_span(load.layers):<9}{weights:>9}{caches:>9}{activations:>13}{room:>8}"
                f"  {', '.join(load.parts)}"
            )
        if self.places.waiting:
            groups = sorted(self.places.waiting - {f"layers.{i}" for i in range(len(self.places.layers))})
            waiting = [i for i in range(len(self.places.layers)) if f"layers.{i}" in self.places.waiting]
            named = [*groups, *([f"layers {_span(waiting)}"] if waiting else [])]
            lines.append(f"{'host':<10}{'':<9}{self.host / GIB:>9.2f}{'':>30}  {', '.join(named)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """Plain data for --json."""
        return {
            "waiting": sorted(self.places.waiting),
            "host_bytes": self.host,
            "devices": [
                {
                    "device": load.gpu.device, "gpu": load.gpu.name, "room": load.gpu.room,
                    "layers": list(load.layers), "parts": list(load.parts), "weights": load.weights,
                    "caches": load.caches, "activations": load.activations,
                }
                for load in self.loads
            ],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Phase:
    """A phase of a task, with its bytes from the memory prediction."""

    caches: float  # of all layers
    activations: float
    name: str


@dataclass(frozen=True, slots=True)
class _Needs:
    """The memory that a build needs."""

    weights: Mapping[str, int]  # group ("layers.3", "vit", "home") -> bytes
    phases: tuple[_Phase, ...]
    layers: int

    def load(self, gpu: Gpu, layers: Sequence[int], parts: Sequence[str], waiting: frozenset[str]) -> Load:
        """The load of a GPU that has these layers and parts, of which `waiting` are copied from host memory in turn."""
        groups = [*(f"layers.{i}" for i in layers), *parts]
        resident = sum(self.weights[g] for g in groups if g not in waiting)
        copied = max((self.weights[g] for g in groups if g in waiting and g != "embed_tokens"), default=0)
        caches, activations = max(
            ((p.caches * len(layers) / self.layers, p.activations if _takes_part(p, layers, parts) else 0.0)
             for p in self.phases),
            key=sum,
        )  # fmt: skip
        return Load(gpu, tuple(layers), tuple(parts), resident + copied, round(caches), round(activations))


def plan_map(build: BuildOutline, gpus: Sequence[Gpu], sizes: Workload | None = None) -> MapPlan:
    """The device map of a build over these GPUs. `sizes` are those of the requests. Raises TargetError if none fits."""
    needs = _needs(build, sizes or Workload())
    most_waiting: frozenset[str] = frozenset()
    for waiting in _waiting_sets(build, needs.layers):
        for count in range(1, len(gpus) + 1):
            found = [plan for plan in _divisions(needs, gpus[:count], waiting) if plan is not None]
            if found:
                return max(found, key=_spare)
        most_waiting = waiting
    room = ", ".join(f"{gpu.device} {gpu.room / GIB:.2f}" for gpu in gpus)
    least = sum(size for group, size in needs.weights.items() if group not in most_waiting)
    raise TargetError(
        f"{build.name} does not fit on these devices (usable GiB: {room}): {least / GIB:.2f} GiB of its weights cannot"
        " wait in host memory, and caches and activations come on top; take a recipe with fewer bits or more devices"
        f"{_hint(gpus)}."
    )


def _hint(gpus: Sequence[Gpu]) -> str:
    """The packaged recipe of least error that fits one of these GPUs alone, as the end of a sentence; else empty."""
    usable = max(gpu.room for gpu in gpus) + SLACK + Device.model_fields["context_mib"].default * MIB
    if usable < MIB:
        return ""
    names = recipes_for(Target(name="largest", device=Device(name="GPU", memory_mib=int(usable // MIB))))
    return f": recipe {names[0]} fits the largest of them alone" if names else ""


def gpu_of(target: Target, device: str) -> Gpu:
    """The GPU that a target describes, as the device `device`."""
    return Gpu(device, target.device.name, target.device.usable - (target.device.context_mib * MIB + SLACK))


def _needs(build: BuildOutline, sizes: Workload) -> _Needs:
    report = predict(build, Target(name="map", device=Device(name="any", memory_mib=1), sizes=sizes))
    phases = tuple(_Phase(p.parts[CACHES], p.parts[ACTIVATIONS], p.name.partition(": ")[2]) for p in report.phases)
    return _Needs(held_bytes(build), phases, build.config.llm.num_layers)


def held_bytes(build: BuildOutline) -> dict[str, int]:
    """Group -> bytes on a GPU: stored codes for units that stay coded, bf16 for the others, fp32 for the VAE."""
    held = dict.fromkeys(("home", "embed_tokens", *FREE_PARTS), 0)
    for stored in build.units:
        group = group_of(parameter_path(stored.unit.specs[0].name))
        sizes = [p.nbytes for p in stored.parts.values()] if stored.stays_coded else [2 * stored.unit.numel]
        held[group] = held.get(group, 0) + sum(-(-size // CUDA_ROUNDING) * CUDA_ROUNDING for size in sizes)
    with torch.device("meta"):
        held["vae"] = sum(p.nbytes for p in AutoEncoder(build.vae).parameters())
    return held


def _waiting_sets(build: BuildOutline, layers: int) -> Iterator[frozenset[str]]:
    """Sets of groups that wait in host memory: first none, then one group more each time, up to all that can wait."""
    fixed = {group_of(parameter_path(s.unit.specs[0].name)) for s in build.units if not s.codec.movable}
    fixed -= {"embed_tokens"}
    waiting: frozenset[str] = frozenset()
    yield waiting
    for group in (*WAITING_ORDER, *(f"layers.{i}" for i in reversed(range(layers)))):
        if group not in fixed:
            waiting |= {group}
            yield waiting


def _divisions(needs: _Needs, gpus: Sequence[Gpu], waiting: frozenset[str]) -> Iterator[MapPlan | None]:
    """For each placement of ViT, head and VAE: the division of layers that leaves most memory free, or None.

    The free memory of the fullest GPU is found by bisection, to 1 MiB.
    """
    choices = sorted({0, len(gpus) - 1, max(range(len(gpus)), key=lambda i: gpus[i].room)})
    for chosen in product(choices, repeat=len(FREE_PARTS)):
        parts = [[part for part, at in zip(FREE_PARTS, chosen, strict=True) if at == i] for i in range(len(gpus))]
        parts[0] = ["embed_tokens", "home", *parts[0]]
        low, high, found = 0, max(gpu.room for gpu in gpus), _divided(needs, gpus, parts, waiting, 0)
        while found is not None and high - low > MIB:
            middle = (low + high) // 2
            better = _divided(needs, gpus, parts, waiting, middle)
            low, high, found = (middle, high, better) if better is not None else (low, middle, found)
        yield None if found is None else _plan(needs, found, waiting)


def _divided(
    needs: _Needs, gpus: Sequence[Gpu], parts: Sequence[Sequence[str]], waiting: frozenset[str], spare: int
) -> tuple[Load, ...] | None:
    """Gives each GPU in turn as many layers as leave `spare` of its bytes free; None if layers are left over.

    Layers that wait in host memory compute on the last GPU.
    """
    waiting_layers = [i for i in range(needs.layers) if f"layers.{i}" in waiting]
    placed_layers = needs.layers - len(waiting_layers)
    next_layer, loads = 0, []
    for index, gpu in enumerate(gpus):
        copied: list[int] = waiting_layers if index == len(gpus) - 1 else []
        load = needs.load(gpu, copied, parts[index], waiting)
        taken = 0
        while next_layer + taken < placed_layers:
            more = needs.load(gpu, [*range(next_layer, next_layer + taken + 1), *copied], parts[index], waiting)
            if more.total + spare > gpu.room:
                break
            load, taken = more, taken + 1
        if load.total + spare > gpu.room:
            return None
        next_layer += taken
        loads.append(load)
    return tuple(loads) if next_layer == placed_layers else None


def _plan(needs: _Needs, loads: tuple[Load, ...], waiting: frozenset[str]) -> MapPlan:
    of_layer = {layer: load.gpu.device for load in loads for layer in load.layers}
    of_part = {part: load.gpu.device for load in loads for part in load.parts}
    places = DeviceMap(
        tuple(of_layer[i] for i in range(needs.layers)),
        of_part["home"], of_part["vit"], of_part["lm_head"], of_part["vae"], waiting,
    )  # fmt: skip
    return MapPlan(places, loads, sum(needs.weights[group] for group in waiting))


def _takes_part(phase: _Phase, layers: Sequence[int], parts: Sequence[str]) -> bool:
    """Whether a GPU with these layers and parts computes in the phase, and so needs memory for its activations."""
    if phase.name.startswith("vae"):
        return "vae" in parts
    used = {"vit": ("vit", "home"), "decode": ("lm_head", "home")}.get(phase.name, ("home",))
    return bool(layers) or any(part in parts for part in used)


def _spare(plan: MapPlan) -> int:
    """Free bytes of the fullest GPU."""
    return min(load.gpu.room - load.total for load in plan.loads)


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if layers else "none"
