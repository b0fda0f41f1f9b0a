"""The run-time linears of a DF11 unit: they decode the unit they share into the scratch ring (see `codecs/ring.py`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.df11.device import Df11Unit
from bagel_compress.codecs.ring import RingLinear, decoder_of


def linears(unit: Unit, parts: Mapping[str, torch.Tensor], biases: Mapping[str, torch.Tensor]) -> dict[str, nn.Module]:
    """One module per weight of a unit, by tensor name, over the same stored parts. Raises CodecError on damage."""
    stored = Df11Unit(unit, parts)
    decoder_of(stored.device).expect(stored)
    return {spec.name: RingLinear("df11", stored, spec.name, biases.get(spec.name)) for spec in unit.specs}
