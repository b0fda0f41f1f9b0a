"""Offload: keeps parts of a model in host memory and copies them to the GPU when they are needed.

A run has phases (text and ViT prefill, VAE encode, text decoding, denoising, VAE decode), each of which computes with a
part of the model. A residency plan lists, for each phase, the parts that are on the GPU. On entering a phase, parts
that are not listed are freed on the GPU, and listed ones are copied to it layer by layer on a side stream, so that the
first layers compute while later ones are copied. A part that is used but not listed is copied layer by layer for its
call and freed after it: this is slow, but works on any GPU.

Only the device of weights changes, so results are the same to the bit. Host copies are pinned on CUDA. Weights that are
not on the GPU are meta tensors there, so that using one by mistake raises an error. An embedding table that no phase
lists always stays in host memory; only the rows that are looked up are copied. Units of a codec that is not `movable`
stay where they were loaded.

Device maps (device_map.py) use the same code: groups that wait in host memory are copied to their device for each call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bagel.sampler import Sampler
from bagel_compress.run.device_map import DeviceMap, group_of
from bagel_compress.run.target import Part, Phase, Target

# Groups of weights that are copied together: an expert of a layer, and the parts outside of the decoder.
_GROUPS: tuple[tuple[str, Part], ...] = (
    (r"(layers\.\d+\.und)\.", "und"),
    (r"(layers\.\d+\.gen)\.", "gen"),
    (r"(embed_tokens)\.", "embed"),
    (r"(lm_head)\.", "head"),
    (r"(vit|connector|vit_pos_embed)\.", "vit"),
)
_PASSES: dict[str, Phase] = {
    "prefill_text": "text",
    "prefill_vit": "vit",
    "prefill_latent": "latent",
    "next_logits": "decode",
    "velocity": "denoise",
}


def reside(sampler: Sampler, plan: Mapping[Phase, tuple[Part, ...]], device: torch.device | str) -> Residency:
    """Makes a sampler, loaded on `device` or on the CPU, follow a residency plan on `device`. Changes it in place."""
    everywhere = torch.device(device)
    return Residency(sampler, plan, lambda path: everywhere)


def wait(sampler: Sampler, places: DeviceMap) -> Residency:
    """Makes a sampler that was loaded by a device map copy its waiting groups to the GPU when they are used.

    Changes the sampler in place.
    """

    def device_of(path: str) -> torch.device | None:
        group = group_of(path)
        return places.device_of(group) if group in places.waiting else None

    return Residency(sampler, {}, device_of)


def place(sampler: Sampler, target: Target, device: torch.device | str) -> Residency | None:
    """Moves a sampler to a device as the target defines: completely or by its residency plan, the VAE perhaps on the
    CPU.

    The sampler may be loaded on the CPU or on that device (units that are not `movable` only there). Changes it in
    place.
    """
    if target.residency is not None:
        return reside(sampler, target.residency, device)
    sampler.bagel.to(device)
    sampler.vae.to("cpu" if target.vae_on_host else device)
    return None


@dataclass(slots=True)
class _Group:
    """Tensors that are copied together. `owners`: module, its dictionary of tensors, name, and the host copy."""

    part: Part
    device: torch.device
    owners: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    there: bool = False
    arrival: Any = None  # CUDA event of the copies

    @property
    def nbytes(self) -> int:
        return sum(host.nbytes for _, _, host in self.owners)


class Residency:
    """The groups of a model and their places. `bytes_there` and `peak` count weights on the GPU."""

    def __init__(
        self,
        sampler: Sampler,
        plan: Mapping[Phase, tuple[Part, ...]],
        device_of: Callable[[str], torch.device | None],
    ) -> None:
        """`device_of` maps the path of a module to the device it computes on; None if it is there and stays there."""
        self._plan, self._device_of, self._phase = plan, device_of, ""
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self.bytes_there = self.peak = 0
        device = device_of("embed_tokens")
        if device is not None and not any("embed" in parts for parts in plan.values()):
            sampler.bagel.embed_tokens = _HostEmbedding(sampler.bagel.embed_tokens, device)  # type: ignore[assignment]
        self._groups = self._gathered(sampler)
        for group in self._groups.values():
            _place(group, lambda host: host.to("meta"))
        self._hook(sampler)

    def enter(self, phase: Phase) -> None:
        """Frees the groups that this phase does not list, and copies those that it lists to the GPU."""
        if phase == self._phase:
            return
        self._phase = phase
        listed = self._plan.get(phase, ())
        for group in self._groups.values():
            if group.part not in listed:
                self._drop(group)
        for group in self._groups.values():
            if group.part in listed:
                self._bring(group)

    # --- groups -------------------------------------------------------------------------------------------------------

    def _gathered(self, sampler: Sampler) -> dict[str, _Group]:
        groups: dict[str, _Group] = {}
        for path, module in [
            *sampler.bagel.named_modules(),
            *((f"vae.{p}", m) for p, m in sampler.vae.named_modules()),
        ]:
            device = self._device_of(path)
            if device is None:
                continue
            for name, tensor in _own_tensors(module):
                found = _group_of(f"{path}.")
                if found is None:  # norms and bridges, which are small and used in every pass
                    _set(module, name, tensor.to(device))
                    continue
                key, part = found
                groups.setdefault(key, _Group(part, device)).owners.append((module, name, _host(tensor, device)))
        return groups

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device)
        return self._sides[device]

    def _bring(self, group: _Group) -> None:
        if group.there:
            return
        if group.device.type != "cuda":
            _place(group, lambda host: host.to(group.device, copy=True))
        else:
            # Memory is allocated on the current stream, so that memory freed before on it can be reused in order.
            _place(group, lambda host: torch.empty_like(host, device=group.device))
            side = self._side(group.device)
            side.wait_stream(torch.cuda.current_stream(group.device))
            with torch.cuda.stream(side):
                for module, name, host in group.owners:
                    _get(module, name).copy_(host, non_blocking=True)
                group.arrival = side.record_event()
        group.there = True
        self.bytes_there += group.nbytes
        self.peak = max(self.peak, self.bytes_there)

    def _drop(self, group: _Group) -> None:
        if not group.there:
            return
        self._arrived(group)
        _place(group, lambda host: host.to("meta"))
        group.there = False
        self.bytes_there -= group.nbytes

    def _arrived(self, group: _Group) -> None:
        if group.arrival is not None:
            torch.cuda.current_stream(group.device).wait_event(group.arrival)
            group.arrival = None

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _hook(self, sampler: Sampler) -> None:
        bagel = sampler.bagel
        for name, phase in _PASSES.items():
            setattr(bagel, name, self._entering(phase, getattr(bagel, name)))
        sampler.encode = self._using("vae", "vae_encode", sampler.encode)  # type: ignore[method-assign]
        sampler.picture = self._using("vae", "vae_decode", sampler.picture)  # type: ignore[method-assign]
        for index, layer in enumerate(bagel.layers):
            keys = (f"layers.{index}.und", f"layers.{index}.gen")
            layer.register_forward_pre_hook(self._layer_comes(*keys))
            layer.register_forward_hook(self._goes(*keys))
        for name in ("embed_tokens", "lm_head", "vit", "connector", "vit_pos_embed"):
            module = bagel.get_submodule(name)
            module.register_forward_pre_hook(self._comes(name))
            module.register_forward_hook(self._goes(name))

    def _entering(self, phase: Phase, call: Callable[..., Any]) -> Callable[..., Any]:
        def entered(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            return call(*args, **kwargs)

        return entered

    def _using(self, key: str, phase: Phase, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a method that is not a module's forward, so that a group is on the GPU while it runs."""

        def used(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            self._need(key)
            result = call(*args, **kwargs)
            self._unneed(key)
            return result

        return used

    def _layer_comes(self, und: str, gen: str) -> Callable[..., None]:
        def comes(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows, n_und = args[0].shape[0], args[1]
            for key, used in ((und, n_und > 0), (gen, rows > n_und)):
                if used:
                    self._need(key)

        return comes

    def _comes(self, key: str) -> Callable[..., None]:
        return lambda module, args: self._need(key)

    def _goes(self, *keys: str) -> Callable[..., None]:
        def goes(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            for key in keys:
                self._unneed(key)

        return goes

    def _need(self, key: str) -> None:
        if key in self._groups:
            self._bring(self._groups[key])
            self._arrived(self._groups[key])

    def _unneed(self, key: str) -> None:
        group = self._groups.get(key)
        if group is not None and group.part not in self._plan.get(self._phase, ()):  # type: ignore[call-overload]
            self._drop(group)


class _HostEmbedding(nn.Module):
    """An embedding whose table is in host memory; the rows that are looked up are copied to the device."""

    def __init__(self, embedding: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._hidden, self._device = (
            (embedding.cpu(),),
            device,
        )  # in a tuple, so that it is no submodule and never moved

    def forward(self, ids: Tensor) -> Tensor:
        [table] = self._hidden
        rows: Tensor = table(ids.cpu())
        return rows.to(self._device)


def _host(tensor: Tensor, device: torch.device) -> Tensor:
    host = tensor.detach().cpu()
    return host.pin_memory() if device.type == "cuda" else host


def _group_of(path: str) -> tuple[str, Part] | None:
    if path.startswith("vae."):
        return "vae", "vae"
    for pattern, part in _GROUPS:
        if match := re.match(pattern, path):
            return match[1], part
    return None


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = {**module._parameters, **module._buffers}
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def _place(group: _Group, make: Callable[[Tensor], Tensor]) -> None:
    for module, name, host in group.owners:
        _set(module, name, make(host))


def _get(module: nn.Module, name: str) -> Tensor:
    tensor = module._parameters.get(name, module._buffers.get(name))
    assert tensor is not None
    return tensor


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
