"""int4's codes as AutoRound stores them ("auto_round:auto_gptq"): the four-bit form that vLLM-Omni 0.30 takes.

Parts of the module X whose weight has shape (N, K), N a multiple of 8, G weights per scale:

    X.qweight    I32  (K/8, N)    eight codes of a column of X.weight in a word, first in the lowest bits, code + 8
    X.qzeros     I32  (K/G, N/8)  the zero point 8 less one in every nibble, as this layout writes it
    X.scales     BF16 (K/G, N)

The codes and scales are those of the other dialect, transposed. Source: `AutoGPTQLinearMethod` and `INCConfig` of
vLLM 0.30.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from bagel_compress.codecs.base import TORCH_DTYPES, Chunk, Encoding, Unit
from bagel_compress.codecs.grid import Grid, Scales
from bagel_compress.errors import PlanError
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    import torch

ZEROS: Final = 0x77777777
PER_WORD: Final = 8


def stored_parts(spec: TensorSpec, group: int) -> dict[str, PartSpec]:
    (rows, columns), module = spec.shape, spec.name.removesuffix("weight")
    return {
        f"{module}qweight": PartSpec("I32", (columns // PER_WORD, rows)),
        f"{module}qzeros": PartSpec("I32", (columns // group, rows // PER_WORD)),
        f"{module}scales": PartSpec("BF16", (columns // group, rows)),
    }


def transposed(spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parts of this dialect from those of compressed-tensors'."""
    import torch

    module, scale = spec.name.removesuffix("weight"), parts[f"{spec.name}_scale"].t().contiguous()
    zeros = torch.full((len(scale), spec.shape[0] // PER_WORD), ZEROS, dtype=torch.int32)
    return {
        f"{module}qweight": parts[f"{spec.name}_packed"].t().contiguous(),
        f"{module}qzeros": zeros,
        f"{module}scales": scale,
    }


def by_rows(spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K/8) int32 and scales (N, K/G) as the other dialect holds them."""
    module = spec.name.removesuffix("weight")
    return parts[f"{module}qweight"].t().contiguous(), parts[f"{module}scales"].t().contiguous()


def reader_config(group: int, units: Sequence[Unit], others: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` with a pattern for each kind of module that is not coded.

    The server fuses modules and puts prefixes before their names, so a pattern names the part that holds them:
    `layers.3.self_attn.q_proj` gives `layers.[0-9]+.self_attn`. Raises PlanError where a part is coded by half.
    """
    coded = [spec.name for unit in units for spec in unit.specs]
    entry = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": group,
        "sym": True,
        "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
        "extra_config": {pattern: {"bits": 16, "data_type": "float"} for pattern in sorted(_patterns(others, coded))},
    }
    return {"quantization_config": entry}


def _patterns(others: Sequence[str], coded: Sequence[str]) -> set[str]:
    """The widest for each module of `others` that finds none of `coded`, which are names of weights."""
    found, parents = set(), {name.removesuffix(".weight").rpartition(".")[0] for name in coded}
    for name in others:
        parent = name.rpartition(".")[0] or name
        if parent in parents:
            raise PlanError(
                f"{parent}: codec int4 with dialect auto-round codes some of its weights and not others, which the "
                "server fuses; give all of them one codec in the recipe."
            )
        alone = re.escape(parent) + r"(\.|$)"
        every = re.sub(r"\\\.[0-9]+(?=\\\.)", r"\\.[0-9]+", alone)
        widest = (every, alone, re.escape(name) + "$")
        found.add(next(pattern for pattern in widest if not any(re.search(pattern, other) for other in coded)))
    return found


@dataclass(slots=True, kw_only=True)
class TransposedEncoding(Encoding):
    """Another encoding whose parts are kept and transposed: 35 MB for the released model's largest weight."""

    spec: TensorSpec
    inner: Encoding

    def chunks(self) -> Iterator[Chunk]:
        import torch

        kinds = self.inner.parts
        parts = {name: torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype]()) for name, part in kinds.items()}
        for chunk in self.inner.chunks():
            flat = parts[chunk.part].view(-1).view(torch.uint8).numpy()
            flat[chunk.start : chunk.start + chunk.data.nbytes] = chunk.data  # type: ignore[union-attr]
        self.quality = self.inner.quality
        for name, tensor in transposed(self.spec, parts).items():
            yield Chunk(name, 0, tensor.reshape(-1).view(torch.uint8).numpy(), lasting=True)


class TransposedGrid(Grid):
    """A grid whose packed parts are those of this dialect."""

    def __init__(self, inner: Grid, spec: TensorSpec) -> None:
        self.inner, self.spec, self.levels, self.block = inner, spec, inner.levels, inner.block

    def scales(self, weights: torch.Tensor, curvature: Any) -> Scales:
        return self.inner.scales(weights, curvature)

    def pack(self, levels: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        return transposed(self.spec, self.inner.pack(levels, scales))
