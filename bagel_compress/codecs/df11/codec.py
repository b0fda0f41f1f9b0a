"""df11: bf16 weights with Huffman-coded exponents. Lossless; about 10.9 bits per weight; the format of `dfloat11`.

The sign and mantissa byte is stored as it is, the exponent (about 2.6 bits of information in trained weights) by one
Huffman book per unit, beside a small index by which thousands of GPU threads decode at once. The stored bytes equal
those of the `dfloat11` package 0.5.0 wherever its own kernel can decode them. Where it cannot, the unit gets a valid
book that it can decode, or (exponents from 240 on: Inf, NaN, |w| >= 2^113) stays bf16 with the reason in `Encoding`.

What it does not do: other dtypes (they would not come back), 1-D tensors and convolutions (the package's reader puts
weights back into linear and embedding modules only), mixing of several codes per unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_serializer

from bagel_compress.codecs.base import Codec, Encoding, Reader, Unit
from bagel_compress.codecs.df11.layout import (
    BYTES_PER_THREAD,
    FIRST_POINTER,
    MAX_TABLES,
    MAX_UNIT_WEIGHTS,
    THREADS_PER_BLOCK,
    UnitSizes,
)
from bagel_compress.codecs.df11.units import Grouping, group, pattern_dict
from bagel_compress.codecs.loaders import Loader
from bagel_compress.codecs.raw import Raw
from bagel_compress.codecs.traits import Snippet
from bagel_compress.errors import PlanError
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    import torch

VERSION = "0.5.0"  # of the `dfloat11` package whose bytes these are; its loader does not read it
TYPICAL_BITS = 10.9  # per weight; the published BAGEL build has 19.89 GB of 29.21 (users' figure, DFloat11 card)


class DF11(Codec):
    """Lossless 11-bit build of bf16 linear and embedding weights.

    `units: published` groups as the released BAGEL build does (whole decoder layers), `units: expert` keeps attention
    and the two experts' MLPs apart (only what runs is decoded, into half the scratch memory), `units: tensor` codes
    every module alone.
    """

    format: Literal["df11"] = "df11"
    grouping: Grouping = Field("published", alias="units", description="which tensors share a code book")
    lossless: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    scans_folder: ClassVar[bool] = True
    movable: ClassVar[bool] = False
    tag: ClassVar[str] = "lossless-compression"

    @model_serializer
    def _entry(self) -> dict[str, Any]:
        return {"format": self.format, "units": self.grouping}

    def units(self, specs: Sequence[TensorSpec]) -> list[Unit]:
        """Modules of the chosen grouping, holding those of their tensors that are in `specs`, in the stored order."""
        return group(specs, self.grouping)

    def check(self, unit: Unit) -> None:
        for spec in unit.specs:
            if spec.dtype != "BF16":
                raise PlanError(f"{spec.name} is {spec.dtype}; df11 is lossless for BF16 only: use raw, or cast first.")
            if len(spec.shape) != 2 or not spec.name.endswith(".weight"):
                raise PlanError(
                    f"{spec.name} of shape {list(spec.shape)} is no linear or embedding weight, and the dfloat11 "
                    "reader puts back only those; use raw."
                )
        if unit.numel > MAX_UNIT_WEIGHTS:
            raise PlanError(
                f"{unit.name} has {unit.numel:,} weights; the dfloat11 kernel indexes at most {MAX_UNIT_WEIGHTS:,}: "
                "choose a finer `units`."
            )

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        """An upper bound for any data: 8 bits per exponent and 16 child tables (`sampled` says more)."""
        return UnitSizes(unit.numel, unit.numel + 1, MAX_TABLES, len(unit.specs)).parts(unit.name)

    def sampled(self, unit: Unit, source: Reader) -> int:
        """Bytes that the unit will hardly exceed, from a sample of its data (see `sample.py`)."""
        from bagel_compress.codecs.df11.sample import likely_bytes

        return likely_bytes(unit, source)

    def begin(self, unit: Unit, source: Reader) -> Encoding:
        """Counts the exponents. A unit that the format cannot hold becomes a raw `Encoding` with the reason."""
        from bagel_compress.codecs.df11.encode import Df11Encoding, choose_book, survey

        found = survey(unit, source)
        if reason := _uncodable(unit, int(found.counts[FIRST_POINTER:].sum())):
            kept = Raw().begin(unit, source)
            kept.reason = reason
            return kept
        book = choose_book(unit, source, found)
        bits = found.bits(book)
        sizes = UnitSizes(unit.numel, -(-int(bits[-1]) // 8), len(book.luts) - 1, len(unit.specs))
        return Df11Encoding(self, sizes.parts(unit.name), unit=unit, source=source, book=book, bits=bits, sizes=sizes)

    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the unit, views of one buffer. Checks every size, code, gap and block position on the way."""
        from bagel_compress.codecs.df11.device import decode_unit

        return decode_unit(unit, parts)

    def linears(
        self, unit: Unit, parts: Mapping[str, torch.Tensor], biases: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.nn.Module]:
        """Modules that decode the unit they share when they are called (see `runtime.py`)."""
        from bagel_compress.codecs.df11.runtime import linears

        return linears(unit, parts, biases)

    def embedding(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> torch.nn.Module | None:
        """On the CPU a table whose rows are decoded when they are first looked up; a GPU decodes all at once."""
        from bagel_compress.codecs.df11.embedding import DF11Embedding

        on_cpu = all(part.device.type == "cpu" for part in parts.values())
        return DF11Embedding(unit, parts) if on_cpu and len(unit.specs) == 1 else None

    def likely_parts(self, unit: Unit) -> dict[str, PartSpec]:
        """One part of TYPICAL_BITS per weight."""
        return {f"{unit.name}.coded": PartSpec("U8", (round(unit.numel * TYPICAL_BITS / 8),))}

    @classmethod
    def ring_units(cls, units: Iterable[Unit]) -> list[tuple[str, int]]:
        """Whole units."""
        return [(unit.name, unit.numel) for unit in units]

    def fake_linears(
        self,
        unit: Unit,
        parts: Mapping[str, torch.Tensor],
        biases: Mapping[str, torch.Tensor],
        scratch: torch.Tensor | None,
    ) -> dict[str, torch.nn.Module]:
        """Linears that multiply with a stretch of the ring: fake bits cannot be decoded."""
        from bagel_compress.codecs.ring_fake import FakeLinear

        assert scratch is not None
        return {spec.name: FakeLinear(spec, biases.get(spec.name), scratch) for spec in unit.specs}

    def loaders(self) -> list[Loader]:
        return [
            Loader(
                "dfloat11", "0.5", "opens", "any NVIDIA GPU", "its from_pretrained",
                "tests/codecs/test_df11_loader.py::test_the_official_loader_gives_the_same_outputs",
            ),
            Loader("ComfyUI-BAGEL, released nodes", "1.0", "opens", "any NVIDIA GPU", "by its folder's name"),
        ]  # fmt: skip

    def snippets(self, repo: str, tensor: str, shard: str, alone: bool) -> list[Snippet]:
        """The `dfloat11` package and the ComfyUI-BAGEL nodes; both read artifacts that hold no other format."""
        return [_dfloat11_snippet(repo), _comfyui_snippet(repo)] if alone else []

    def config(self, units: Sequence[Unit], others: Sequence[str]) -> dict[str, Any]:
        """What `DFloat11Model.from_pretrained` reads: kernel constants and the modules' patterns."""
        return {
            "dfloat11_config": {
                "version": VERSION,
                "threads_per_block": [THREADS_PER_BLOCK],
                "bytes_per_thread": BYTES_PER_THREAD,
                "pattern_dict": pattern_dict(units),
            }
        }


def _dfloat11_snippet(repo: str) -> Snippet:
    text = f"""
from dfloat11 import DFloat11Model
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo}", allow_patterns=["*.json", "model-*.safetensors"])
DFloat11Model.from_pretrained(folder, bfloat16_model=model, device="cpu", device_map=None)
"""
    note = "`model` is the official `Bagel` in bfloat16 without weights; they are decoded on the GPU as they are used."
    return Snippet("dfloat11", text, ("dfloat11",), note=note, cuda=True)


def _comfyui_snippet(repo: str) -> Snippet:
    name = repo.partition("/")[2]
    folder = name if "df11" in name.lower() or "dfloat11" in name.lower() else f"{name}-DF11"
    note = "The ComfyUI-BAGEL nodes know this format by the folder's name; run this where ComfyUI is."
    return Snippet("ComfyUI", f"hf download {repo} --local-dir models/bagel/{folder}", (), "sh", note)


def _uncodable(unit: Unit, too_large: int) -> str:
    if unit.numel == 0:
        return f"{unit.name}: no weights"
    if too_large:
        return (
            f"{unit.name}: {too_large:,} of {unit.numel:,} weights are NaN, Inf or 2^113 and more, whose exponents "
            f"the dfloat11 kernel takes for table pointers"
        )
    return ""
