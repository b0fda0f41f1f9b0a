"""Device maps planned from what a build really holds: which layers and parts go to which card, and what has to wait.

Weights are counted as they are held (stored codes for linears, bf16 for what is decoded at loading, the VAE in fp32),
caches and activations of every phase are those of the budget's prediction; each card pays for the caches of its own
layers and for the activations of the phases it takes part in. The fewest cards that hold everything are used, in the
order in which they were named, and layers are divided so that the card with least room to spare has most. What fits
nowhere waits in host memory, in this order: the embedding table (only rows travel), the VAE, the ViT, the head, then
layers from the last on, which compute on the last card and come one by one. Units of a codec that is not
`movable` cannot wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from bagel.loading import parameter_path
from bagel.vae import AutoEncoder
from bagel_compress.budgets.fake_model import Build
from bagel_compress.budgets.memory_tracker import CUDA_ROUNDING
from bagel_compress.budgets.predict import ACTIVATIONS, CACHES, predict
from bagel_compress.errors import TargetError
from bagel_compress.run.device_map import DeviceMap, group_of
from bagel_compress.run.target import GIB, MIB, Device, Sizes, Target

ASIDE = ("vit", "lm_head", "vae")  # parts that may lie on any card; "embed_tokens" and "home" are on the first
WAITING = ("embed_tokens", "vae", "vit", "lm_head")  # what waits before any layer does
SLACK = 256 * MIB  # of each card: workspaces of cuBLAS and cuDNN, fragmentation


@dataclass(frozen=True, slots=True)
class Card:
    """A device and the bytes of it that weights, caches and activations may take."""

    device: str
    name: str
    room: int


@dataclass(frozen=True, slots=True)
class Load:
    """What a card holds in its worst phase, in bytes."""

    card: Card
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
    """A map with what each card holds under it, and what waits."""

    places: DeviceMap
    loads: tuple[Load, ...]
    host: int  # bytes of weights in host memory

    def table(self) -> str:
        """The map as text, in GiB."""
        lines = [f"{'device':<10}{'layers':<9}{'weights':>9}{'caches':>9}{'activations':>13}{'room':>8}  parts"]
        for load in self.loads:
            numbers = (load.weights, load.caches, load.activations, load.card.room)
            weights, caches, activations, room = (f"{n / GIB:.2f}" for n in numbers)
            lines.append(
                f"{load.card.device:<10}{_span(load.layers):<9}{weights:>9}{caches:>9}{activations:>13}{room:>8}"
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
                    "device": load.card.device, "card": load.card.name, "room": load.card.room,
                    "layers": list(load.layers), "parts": list(load.parts), "weights": load.weights,
                    "caches": load.caches, "activations": load.activations,
                }
                for load in self.loads
            ],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Phase:
    caches: float  # of all layers
    activations: float
    name: str


@dataclass(frozen=True, slots=True)
class _Needs:
    """Bytes of each group, and the phases."""

    weights: Mapping[str, int]
    phases: tuple[_Phase, ...]
    layers: int

    def load(self, card: Card, layers: Sequence[int], parts: Sequence[str], waiting: frozenset[str]) -> Load:
        """What these layers and parts make a card hold in its worst phase."""
        groups = [*(f"layers.{i}" for i in layers), *parts]
        there = sum(self.weights[g] for g in groups if g not in waiting)
        brought = max((self.weights[g] for g in groups if g in waiting and g != "embed_tokens"), default=0)
        caches, activations = max(
            ((p.caches * len(layers) / self.layers, p.activations if _takes_part(p, layers, parts) else 0.0)
             for p in self.phases),
            key=sum,
        )  # fmt: skip
        return Load(card, tuple(layers), tuple(parts), there + brought, round(caches), round(activations))


def plan_map(build: Build, cards: Sequence[Card], sizes: Sizes | None = None) -> MapPlan:
    """The map of a build over these cards. Raises TargetError, in one sentence, if there is none."""
    needs = _needs(build, sizes or Sizes())
    best = None
    for waiting in _steps(build, needs.layers):
        for count in range(1, len(cards) + 1):
            found = [plan for plan in _divisions(needs, cards[:count], waiting) if plan is not None]
            if found:
                return max(found, key=_spare)
        best = waiting
    room = ", ".join(f"{card.device} {card.room / GIB:.2f}" for card in cards)
    least = sum(size for group, size in needs.weights.items() if group not in (best or frozenset()))
    raise TargetError(
        f"{build.name} does not fit on these devices (GiB of room: {room}): {least / GIB:.2f} GiB of its weights cannot"
        " wait in host memory, and caches and activations come on top; take a recipe with fewer bits or more devices."
    )


def card_of(target: Target, device: str) -> Card:
    """The card of a target, as one of several."""
    return Card(device, target.device.name, target.device.usable - (target.device.context_mib * MIB + SLACK))


def _needs(build: Build, sizes: Sizes) -> _Needs:
    report = predict(build, Target(name="map", device=Device(name="any", memory_mib=1), sizes=sizes))
    phases = tuple(_Phase(p.parts[CACHES], p.parts[ACTIVATIONS], p.name.partition(": ")[2]) for p in report.phases)
    return _Needs(held_bytes(build), phases, build.config.llm.num_layers)


def held_bytes(build: Build) -> dict[str, int]:
    """Bytes on a card of each group: codes where linears run from them, else bf16; the VAE in fp32."""
    held = dict.fromkeys(("home", "embed_tokens", *ASIDE), 0)
    for stored in build.units:
        group = group_of(parameter_path(stored.unit.specs[0].name))
        sizes = [p.nbytes for p in stored.parts.values()] if stored.runs_coded else [2 * stored.unit.numel]
        held[group] = held.get(group, 0) + sum(-(-size // CUDA_ROUNDING) * CUDA_ROUNDING for size in sizes)
    with torch.device("meta"):
        held["vae"] = sum(p.nbytes for p in AutoEncoder(build.vae).parameters())
    return held


def _steps(build: Build, layers: int) -> Iterator[frozenset[str]]:
    """What waits, from nothing to all that can."""
    fixed = {group_of(parameter_path(s.unit.specs[0].name)) for s in build.units if not s.codec.movable}
    fixed -= {"embed_tokens"}
    waiting: frozenset[str] = frozenset()
    yield waiting
    for group in (*WAITING, *(f"layers.{i}" for i in reversed(range(layers)))):
        if group not in fixed:
            waiting |= {group}
            yield waiting


def _divisions(needs: _Needs, cards: Sequence[Card], waiting: frozenset[str]) -> Iterator[MapPlan | None]:
    """For every way to lay the parts aside: the division of layers with most room to spare, or None."""
    choices = sorted({0, len(cards) - 1, max(range(len(cards)), key=lambda i: cards[i].room)})
    for chosen in product(choices, repeat=len(ASIDE)):
        parts = [[part for part, at in zip(ASIDE, chosen, strict=True) if at == i] for i in range(len(cards))]
        parts[0] = ["embed_tokens", "home", *parts[0]]
        low, high, found = 0, max(card.room for card in cards), _divided(needs, cards, parts, waiting, 0)
        while found is not None and high - low > MIB:
            middle = (low + high) // 2
            better = _divided(needs, cards, parts, waiting, middle)
            low, high, found = (middle, high, better) if better is not None else (low, middle, found)
        yield None if found is None else _plan(needs, found, waiting)


def _divided(
    needs: _Needs, cards: Sequence[Card], parts: Sequence[Sequence[str]], waiting: frozenset[str], spare: int
) -> tuple[Load, ...] | None:
    """Layers to cards in order, each as many as leave `spare` bytes, those that wait last; None if some are left."""
    late = [i for i in range(needs.layers) if f"layers.{i}" in waiting]
    next_layer, loads = 0, []
    for index, card in enumerate(cards):
        mine: list[int] = late if index == len(cards) - 1 else []
        load = needs.load(card, mine, parts[index], waiting)
        taken = 0
        while next_layer + taken < needs.layers - len(late):
            more = needs.load(card, [*range(next_layer, next_layer + taken + 1), *mine], parts[index], waiting)
            if more.total + spare > card.room:
                break
            load, taken = more, taken + 1
        if load.total + spare > card.room:
            return None
        next_layer += taken
        loads.append(load)
    return tuple(loads) if next_layer == needs.layers - len(late) else None


def _plan(needs: _Needs, loads: tuple[Load, ...], waiting: frozenset[str]) -> MapPlan:
    of_layer = {layer: load.card.device for load in loads for layer in load.layers}
    of_part = {part: load.card.device for load in loads for part in load.parts}
    places = DeviceMap(
        tuple(of_layer[i] for i in range(needs.layers)),
        of_part["home"], of_part["vit"], of_part["lm_head"], of_part["vae"], waiting,
    )  # fmt: skip
    return MapPlan(places, loads, sum(needs.weights[group] for group in waiting))


def _takes_part(phase: _Phase, layers: Sequence[int], parts: Sequence[str]) -> bool:
    if phase.name.startswith("vae"):
        return "vae" in parts
    used = {"vit": ("vit", "home"), "decode": ("lm_head", "home")}.get(phase.name, ("home",))
    return bool(layers) or any(part in parts for part in used)


def _spare(plan: MapPlan) -> int:
    return min(load.card.room - load.total for load in plan.loads)


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if layers else "none"
