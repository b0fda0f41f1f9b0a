"""Running from coded units: linears that decode their unit when they are called, into one scratch buffer.

A unit's weights exist in bf16 only while it is in the scratch ring of its device, which holds two decoder-layer units,
the one in use and the one that comes next, or the largest unit of all (`ring_weights`). All formats that decode in
units share it. On CUDA the next one, known from the order of earlier calls, is decoded on a side stream while the
current one is multiplied. `keep_bytes` is memory for units that stay decoded: those of the understanding expert and the
head, first come first served, because image generation sends two wrapper tokens through that expert at every step and
decoding it for two rows would double the work.

It does not fuse decoding and multiplication, and one device's decoder serves one thread.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from bagel_compress.codecs.gradients import multiplied
from bagel_compress.codecs.ring_size import RING_ALIGNMENT, ring_weights

# CUDA memory that is left free when the rest is used to keep decoded units: activations of a 1024 x 1024 pass (0.7 GB),
# key/value caches of three CFG contexts (1.6 GB), the autoencoder's decoder and the allocator's slack.
RESERVE = 6_000_000_000
LOOK_AHEAD = 4  # units that are already there are skipped when the next one to decode is sought


class StoredUnit(Protocol):
    """Checked parts of a unit on their device, ready to decode: what a format hands to the ring."""

    name: str
    numel: int
    nbytes: int  # of all stored parts
    device: torch.device
    for_understanding: bool  # of the understanding expert alone, or the head

    def place(self, tensor: str) -> tuple[int, tuple[int, int]]:
        """First weight and shape of one of the unit's tensors."""

    def decode_into(self, out: torch.Tensor) -> torch.Tensor:
        """Decodes into the front of a 1-D bf16 buffer on the unit's device; returns that front.

        On a GPU in stream order. Raises CodecError on a damaged stream on the CPU; a GPU does not look.
        """


class RingLinear(nn.Module):
    """x @ W.T + bias, with W decoded on demand from a unit shared with other linears."""

    def __init__(self, codec: str, unit: StoredUnit, tensor: str, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.codec = codec  # the format's name
        start, shape = unit.place(tensor)
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.stored_bytes = round(unit.nbytes * shape[0] * shape[1] / unit.numel)
        self._unit, self._start = unit, start

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight, bf16 [out, in]: a view of scratch memory, valid until another unit is asked for."""
        flat = decoder_of(self._unit.device).flat(self._unit)
        return flat[self._start : self._start + self.out_features * self.in_features].view(self.out_features, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiplied(x, lambda x: nn.functional.linear(x, self.weight, self.bias), lambda: self.weight)

    def describe(self) -> dict[str, str]:
        """What this module is, for a census of a loaded model."""
        return {"codec": self.codec, "stored": self.codec, "compute": "bfloat16"}


class UnitDecoder:
    """Decoded units of one device: the kept ones, and a ring of scratch memory for the others."""

    def __init__(self, device: torch.device, keep_bytes: int | None = None) -> None:
        self.keep_bytes = keep_bytes  # None: on CUDA what is free at the first decoding less RESERVE, elsewhere 0
        self.decoded = 0  # weights decoded so far
        self._device = device
        self._kept: WeakKeyDictionary[StoredUnit, torch.Tensor] = WeakKeyDictionary()
        self._ring = torch.empty(0, dtype=torch.bfloat16, device=device)
        self._expected: set[tuple[str, int]] = set()
        self._ring_weights = self._head = 0
        self._live: WeakKeyDictionary[StoredUnit, int] = WeakKeyDictionary()  # first weight in the ring
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._prefetched: torch.cuda.Event | None = None  # of the last decoding on the side stream
        # What came after two units, by their ids, and the last two: weak, so that an unused model is freed.
        self._following: dict[tuple[int, int], ref[StoredUnit]] = {}
        self._before, self._last = 0, 0

    @property
    def ring_bytes(self) -> int:
        """Bytes of scratch memory that are held now."""
        return self._ring.nbytes

    def expect(self, unit: StoredUnit) -> None:
        """Lets the ring be large enough for a unit when it is first allocated."""
        if (unit.name, unit.numel) not in self._expected:
            self._expected.add((unit.name, unit.numel))
            self._ring_weights = ring_weights(self._expected)

    def flat(self, unit: StoredUnit) -> torch.Tensor:
        """All weights of a unit, 1-D bf16, valid until the next call for another unit."""
        first_use = id(unit) != self._last
        if first_use:
            self._following[self._before, self._last] = ref(unit)
            self._before, self._last = self._last, id(unit)
        flat = self._kept.get(unit)
        if flat is None:
            flat = self._ready(unit)
        if first_use and self._side is not None:
            self._prefetch(unit)
        return flat

    def _ready(self, unit: StoredUnit) -> torch.Tensor:
        if self._prefetched is not None:  # also before its stretch of the ring is given to another unit
            torch.cuda.current_stream(self._device).wait_event(self._prefetched)
        start = self._live.get(unit)
        if start is not None:
            return self._ring[start : start + unit.numel]
        if self._keeps(unit):
            kept = torch.empty(unit.numel, dtype=torch.bfloat16, device=self._device)
            self._kept[unit] = self._decode(unit, kept)
            return kept
        start = self._make_room(unit)
        assert start is not None
        flat = self._decode(unit, self._ring[start:])
        self._live[unit] = start
        return flat

    def _decode(self, unit: StoredUnit, out: torch.Tensor) -> torch.Tensor:
        self.decoded += unit.numel
        return unit.decode_into(out)

    def _keeps(self, unit: StoredUnit) -> bool:
        if self.keep_bytes is None:
            free = torch.cuda.mem_get_info(self._device)[0] if self._side is not None else 0
            self.keep_bytes = max(0, free - 2 * self._ring_weights - RESERVE) if free else 0
        held = sum(2 * flat.numel() for flat in self._kept.values())
        return unit.for_understanding and held + 2 * unit.numel <= self.keep_bytes

    def _make_room(self, unit: StoredUnit, spare: StoredUnit | None = None) -> int | None:
        """First weight of a free stretch of the ring; what lies there is dropped. None if that would be `spare`."""
        self.expect(unit)
        if self._ring.numel() < self._ring_weights:
            self._live.clear()
            self._ring = torch.empty(self._ring_weights, dtype=torch.bfloat16, device=self._device)
            self._head = 0
        size = -(-unit.numel // RING_ALIGNMENT) * RING_ALIGNMENT
        start = self._head if self._head + size <= self._ring.numel() else 0
        dropped = [u for u, at in self._live.items() if at < start + size and start < at + u.numel]
        if spare in dropped:
            return None
        for other in dropped:
            del self._live[other]
        self._head = start + size
        return start

    def _prefetch(self, current: StoredUnit) -> None:
        """Decodes the next unit that is not there yet, behind everything that was launched so far."""
        following = self.following(current)
        if following is None or self._side is None:
            return
        start = self._make_room(following, spare=current)
        if start is None:
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            self._decode(following, self._ring[start:])
            self._prefetched = torch.cuda.Event()
            self._prefetched.record(self._side)
        self._live[following] = start

    def following(self, current: StoredUnit) -> StoredUnit | None:
        """The unit to come, by what followed these two before, that has to be decoded into the ring."""
        before, last = self._before, id(current)
        for _ in range(LOOK_AHEAD):
            known = self._following.get((before, last))
            following = known() if known else None
            if following is None:
                return None
            if following not in self._live and following not in self._kept:
                return None if self._keeps(following) else following
            before, last = last, id(following)
        return None


@cache
def decoder_of(device: torch.device) -> UnitDecoder:
    """The decoder that all modules of a device share."""
    return UnitDecoder(device)
