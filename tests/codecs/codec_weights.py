"""Weights for the codec tests, and a reader that counts what is read."""

import torch

from bagel_compress.codecs.base import Codec, Encoding, Quality, Unit, dtype_code
from bagel_compress.io.tensor_spec import TensorSpec

NAME = "w.weight"


def weight(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    """Normal bf16 values."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(dtype_code(tensor.dtype), tuple(tensor.shape), NAME)


def unit_of(tensor: torch.Tensor) -> Unit:
    return Unit(NAME, (spec_of(tensor),))


def encoded(codec: Codec, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return codec.encode(unit_of(tensor), {NAME: tensor})


def decoded(codec: Codec, tensor: torch.Tensor) -> torch.Tensor:
    """What comes back after a round trip."""
    return codec.decode(unit_of(tensor), encoded(codec, tensor))[NAME]


def written(codec: Codec, tensor: torch.Tensor) -> Encoding:
    """The encoding after all of its chunks."""
    encoding = codec.begin(unit_of(tensor), Whole(tensor))
    for _ in encoding.chunks():
        pass
    return encoding


def quality_of(codec: Codec, tensor: torch.Tensor) -> Quality:
    return written(codec, tensor).quality


def snr_db(tensor: torch.Tensor, other: torch.Tensor) -> float:
    noise = (tensor.double() - other.double()).square().sum()
    return float(10 * torch.log10(tensor.double().square().sum() / noise))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bits (NaN and -0 included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


class Whole:
    """A Reader over one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.flat = tensor.reshape(-1)

    def read(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        return self.flat[start:stop]
