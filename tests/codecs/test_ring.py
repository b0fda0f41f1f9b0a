"""The scratch ring: where units lie in it, what a new one drops, and what stays."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bagel_compress.codecs.ring import UnitDecoder
from bagel_compress.codecs.ring_size import RING_ALIGNMENT, ring_weights

CPU = torch.device("cpu")


@dataclass(eq=False)
class Stored:
    """A unit whose weights are all `value`; `decoded` counts how often it was decoded."""

    name: str
    numel: int
    value: float
    for_understanding: bool = False
    nbytes: int = 0
    device: torch.device = CPU
    decoded: int = field(default=0)

    def place(self, tensor: str) -> tuple[int, tuple[int, int]]:
        return 0, (1, self.numel)

    def decode_into(self, out: torch.Tensor) -> torch.Tensor:
        self.decoded += 1
        return out[: self.numel].fill_(self.value)


def unit(layer: int, numel: int) -> Stored:
    return Stored(f"language_model.model.layers.{layer}.mlp", numel, float(layer + 1))


def ring_of(*units: Stored, keep_bytes: int = 0) -> UnitDecoder:
    decoder = UnitDecoder(CPU, keep_bytes)
    for stored in units:
        decoder.expect(stored)
    return decoder


def where(decoder: UnitDecoder, stored: Stored) -> int:
    """First weight of the unit in the ring, after a check of its weights."""
    flat = decoder.flat(stored)
    assert flat.shape == (stored.numel,)
    assert bool((flat == stored.value).all())
    return int(flat.storage_offset())


def test_units_begin_at_multiples_of_the_alignment_and_fill_the_ring_to_its_end() -> None:
    a, b, c = unit(0, 100), unit(1, 128), unit(2, 128)
    assert ring_weights((u.name, u.numel) for u in (a, b, c)) == 256
    assert RING_ALIGNMENT == 64
    decoder = ring_of(a, b, c)
    assert [where(decoder, a), where(decoder, b)] == [0, 128]  # 128 + 128 weights are all that there is
    assert decoder.ring_bytes == 2 * 256
    assert where(decoder, c) == 0  # round again


def test_a_new_unit_drops_those_it_lies_on_and_no_neighbour() -> None:
    a, b, c, d = unit(0, 128), unit(1, 128), unit(2, 64), unit(3, 64)
    decoder = ring_of(a, b, c, d)
    assert [where(decoder, u) for u in (a, b, c)] == [0, 128, 0]
    assert where(decoder, b) == 128
    assert (b.decoded, where(decoder, d), c.decoded) == (1, 64, 1)  # c ends where d begins, d ends where b begins
    for kept in (b, c, d):
        where(decoder, kept)
        assert kept.decoded == 1
    where(decoder, a)
    assert a.decoded == 2


def test_a_unit_that_ends_within_another_drops_it() -> None:
    a, b, c, d = unit(0, 128), unit(1, 128), unit(2, 64), unit(3, 128)
    decoder = ring_of(a, b, c, d)
    assert [where(decoder, u) for u in (a, b, c, d)] == [0, 128, 0, 64]  # d lies on the first half of b
    where(decoder, c)
    where(decoder, b)
    assert (c.decoded, b.decoded) == (1, 2)


def test_the_next_unit_never_takes_the_place_of_the_one_in_use() -> None:
    a, b = unit(0, 128), unit(1, 256)
    decoder = ring_of(a)
    where(decoder, a)
    assert decoder._make_room(unit(2, 128), spare=a) == 128
    assert decoder._make_room(unit(3, 128), spare=a) is None  # round again, onto it
    where(decoder, a)
    assert a.decoded == 1
    where(ring_of(a, b), b)  # a larger unit has a larger ring


def test_a_ring_grows_for_a_unit_that_nobody_expected() -> None:
    a, b = unit(0, 64), unit(1, 128)
    decoder = ring_of(a)
    where(decoder, a)
    assert decoder.ring_bytes == 2 * 128
    assert [where(decoder, b), where(decoder, a)] == [0, 128]
    assert (decoder.ring_bytes, a.decoded) == (2 * 256, 2)  # what lay in the old ring went with it


def test_kept_units_are_counted_to_the_last_byte() -> None:
    head, text = Stored("lm_head", 100, 5.0, True), Stored("text", 28, 6.0, True)
    for room, again in ((256, 0), (255, 1)):
        head.decoded = text.decoded = 0
        decoder = ring_of(head, text, unit(0, 128), keep_bytes=room)
        other = unit(0, 128)
        for _ in range(2):
            for stored in (head, text, other, unit(1, 128)):
                where(decoder, stored)
        assert (head.decoded, text.decoded) == (1, 1 + again)
