"""What the block floats share: NVFP4, MXFP4 and MXFP8 hold small floats with a byte for a scale per block of a row.

A scale byte is chosen for each block from its largest magnitude ("absmax"), or searched among its neighbours for least
squared error ("mse"). What a byte stands for is a power of two, or a number of four bits times a power of two, so the
product with a level has at most six bits: every decoder, whatever it computes in, gives the same bf16 weights. The one
exception would be products below the normal numbers, which `Scaling` keeps out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from bagel_compress.codecs.base import Chunk, Encoding, Reader, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec
from bagel_compress.codecs.grid import Curvature, Grid, Levels, Scales, block_errors
from bagel_compress.codecs.matrix import INFINITY_WORD, MatrixCodec, as_floats, not_finite, read_rows, self_check
from bagel_compress.errors import PlanError
from bagel_compress.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

DECODE_ELEMENTS = 1 << 21  # decoded at a time: bounds the fp32 temporaries to some 8 MB
FP4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1, by code; bit 3 of a code is the sign
FP4 = Levels(low=-6, high=6, table=tuple(sorted({sign * level for level in FP4_LEVELS for sign in (-1, 1)})))
FP8 = Levels(low=-448, high=448, mantissa=3, smallest=2.0**-6)


@dataclass(frozen=True, slots=True)
class Scaling:
    """The scales of one weight: what its bytes stand for, and which byte a block gets."""

    table: np.ndarray  # (256,) fp32: what a level is multiplied with; a power of two times at most four bits
    low: int  # bytes in use
    high: int
    plain: np.ndarray  # (32768,) uint8: the byte for a block's largest magnitude, by its bf16 word
    stored: dict[str, np.ndarray] = field(default_factory=dict)  # further parts, by full name
    least: float = 0.0  # largest magnitude of a block under which its scale is too large for it

    def note(self, tops: np.ndarray) -> str:
        """What the manifest says of blocks whose largest magnitudes have the bf16 words `tops`: "" if all have their
        scale."""
        import numpy as np

        lost = np.count_nonzero((tops > 0) & (as_floats(tops) < self.least)) if self.least else 0
        return (
            f"{lost:,} of {tops.size:,} blocks are under the range of its scales and got the smallest" if lost else ""
        )


class BlockFloat(CalibratedCodec, MatrixCodec):
    """Base: e2m1 (two codes a byte) or e4m3fn, one scale byte per block along the input."""

    scale: Literal["absmax", "mse"] = "absmax"
    block: ClassVar[int]
    eight_bits: ClassVar[bool] = False
    needs_top: ClassVar[bool] = False  # True: `scaling` depends on the largest magnitude, so the weight is read twice
    offsets: ClassVar[tuple[int, ...]]  # of the scale bytes that "mse" tries, from that of "absmax", itself first

    def check(self, unit: Unit) -> None:
        super().check(unit)
        for spec in unit.specs:
            if spec.shape[1] % self.block:
                raise PlanError(
                    f"{spec.name}: codec {self.format} needs rows of a multiple of {self.block} weights, found "
                    f"{spec.shape[1]}; give it codec int8 or raw in the recipe."
                )

    @property
    def levels(self) -> Levels:
        return FP8 if self.eight_bits else FP4

    @abstractmethod
    def scaling(self, spec: TensorSpec, top: int) -> Scaling:
        """For a weight whose largest magnitude has the bf16 word `top`."""

    @abstractmethod
    def codes_name(self, spec: TensorSpec) -> str:
        """Full name of the part with the codes; that of the scale bytes is `X.weight_scale`."""

    def begin(self, unit: Unit, source: Reader) -> Encoding:
        return _BlockEncoding(codec=self, parts=self.parts(unit), spec=unit.specs[0], source=source)

    def grid(self, spec: TensorSpec) -> Grid:
        return _BlockGrid(self, spec)


def scale_name(spec: TensorSpec) -> str:
    return f"{spec.name}_scale"


def decode_blocks(codes: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Codes (N, K/2) uint8 of e2m1 or (N, K) e4m3fn, and fp32 scales (N, K/block) -> (N, K) bf16."""
    import torch

    from bagel_compress.codecs.linears import is_fake

    columns = scales.shape[1] * block
    out = torch.empty((codes.shape[0], columns), dtype=torch.bfloat16, device=codes.device)
    step = max(1, DECODE_ELEMENTS // columns)
    # The pieces of fake tensors are alike: one shows the memory that all take in turn.
    for first in range(0, step if is_fake(codes) else codes.shape[0], step):
        rows = slice(first, first + step)
        levels = unpack_fp4(codes[rows]) if codes.dtype == torch.uint8 else codes[rows].float()
        out[rows] = (levels.unflatten(1, (-1, block)) * scales[rows, :, None]).flatten(1)
    return out


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """(N, K/2) uint8, even columns in the low nibble -> (N, K) fp32 levels."""
    import torch

    table = torch.tensor([*FP4_LEVELS, *(-level for level in FP4_LEVELS)], device=packed.device)
    pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], 1)
    return pairs[packed.int()].flatten(1)


@dataclass(slots=True, kw_only=True)
class _BlockEncoding(Encoding):
    codec: BlockFloat
    spec: TensorSpec
    source: Reader

    def chunks(self) -> Iterator[Chunk]:
        import numpy as np

        from bagel_compress.codecs.kernels.block_kernels import fp4_blocks, fp8_blocks
        from bagel_compress.codecs.kernels.threads import split

        codec, spec = self.codec, self.spec
        scaling, blocks = codec.scaling(spec, self._top()), spec.shape[1] // codec.block
        width, encode = (spec.shape[1], fp8_blocks) if codec.eight_bits else (spec.shape[1] // 2, fp4_blocks)
        codes = np.empty((0, width), np.uint8)
        tops = np.empty((spec.shape[0], blocks), np.uint16)
        for first, words in read_rows(self.source, spec):
            own = tops[first : first + len(words)]
            own[:] = self._tops(words, codec.block)
            codes = np.empty((len(words), width), np.uint8) if len(codes) < len(words) else codes[: len(words)]
            scales, sums = self._scales(words, own, scaling), np.empty((len(words), 3))

            def part(a: int, b: int) -> None:
                encode(words[a:b], codec.block, scales[a:b], scaling.table, codes[a:b], sums[a:b])  # noqa: B023

            split(part, len(words), 1)
            self_check(spec, codec, not sums[:, 2].any())
            self.quality.add(*sums[:, :2].sum(0).tolist())
            yield Chunk(codec.codes_name(spec), first * width, codes.reshape(-1))
            yield Chunk(scale_name(spec), first * blocks, scales.reshape(-1))
        for name, values in scaling.stored.items():
            yield Chunk(name, 0, values.view(np.uint8))
        self.reason = scaling.note(tops)

    def _top(self) -> int:
        """The word of the weight's largest magnitude, 0 where the codec does not ask for it."""
        if not self.codec.needs_top:
            return 0
        return max(int(self._tops(words, words.shape[1]).max()) for _, words in read_rows(self.source, self.spec))

    def _tops(self, words: np.ndarray, block: int) -> np.ndarray:
        """(R, K / block) uint16. Raises CodecError on NaN and Inf."""
        import numpy as np

        from bagel_compress.codecs.kernels.block_kernels import absmax_blocks
        from bagel_compress.codecs.kernels.threads import split

        tops = np.empty((len(words), words.shape[1] // block), np.uint16)
        split(lambda a, b: absmax_blocks(words[a:b], block, tops[a:b]), len(words), 1)
        if (tops >= INFINITY_WORD).any():
            raise not_finite(self.spec, self.codec)
        return tops

    def _scales(self, words: np.ndarray, tops: np.ndarray, scaling: Scaling) -> np.ndarray:
        """(R, B) uint8; `tops`: words of the blocks' largest magnitudes."""
        import numpy as np

        from bagel_compress.codecs.kernels.block_kernels import fp4_search
        from bagel_compress.codecs.kernels.threads import split

        codec = self.codec
        plain = scaling.plain[tops]
        if codec.scale == "absmax":
            return plain
        best, offsets = np.empty_like(plain), np.array(codec.offsets, np.int32)
        ends, table = (np.int32(scaling.low), np.int32(scaling.high)), scaling.table

        def part(a: int, b: int) -> None:
            fp4_search(words[a:b], codec.block, plain[a:b], offsets, *ends, table, best[a:b])

        split(part, len(words), 1)
        return best


class _BlockGrid(Grid):
    """Blocks along the rows."""

    def __init__(self, codec: BlockFloat, spec: TensorSpec) -> None:
        self.codec, self.spec, self.block, self.levels = codec, spec, codec.block, codec.levels

    def scales(self, weights: torch.Tensor, curvature: Curvature) -> Scales:
        import torch

        words = weights.unflatten(1, (-1, self.block)).abs().amax(2).bfloat16().view(torch.int16).int()
        scaling = self.codec.scaling(self.spec, int(words.max()))
        self.note = scaling.note(words.cpu().numpy().astype("uint16"))
        table, plain = (torch.from_numpy(a).to(weights.device) for a in (scaling.table, scaling.plain))
        codes = plain[words].int()
        if self.codec.scale == "mse":
            codes = self._searched(weights, curvature, codes, table, scaling)
        kind = self.codec.parts(Unit(self.spec.name, (self.spec,)))
        stored = {scale_name(self.spec): codes.to(torch.uint8).cpu()}
        stored |= {name: torch.from_numpy(values) for name, values in scaling.stored.items()}
        if kind[scale_name(self.spec)].dtype == "F8_E4M3":
            stored[scale_name(self.spec)] = stored[scale_name(self.spec)].view(torch.float8_e4m3fn)
        return Scales(table[codes], stored)

    def _searched(
        self,
        weights: torch.Tensor,
        curvature: Curvature,
        plain: torch.Tensor,
        table: torch.Tensor,
        scaling: Scaling,
    ) -> torch.Tensor:
        """(N, B) scale bytes of least error as weighted by the moments' diagonal."""
        import torch

        best, least = plain, block_errors(self, weights, curvature.diagonal, table[plain])
        for offset in self.codec.offsets[1:]:
            tried = (plain + offset).clamp(scaling.low, scaling.high)
            error = block_errors(self, weights, curvature.diagonal, table[tried])
            better = error < least
            best, least = torch.where(better, tried, best), torch.where(better, error, least)
        return best

    def pack(self, levels: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        import torch

        levels = levels.cpu().contiguous()
        if self.codec.eight_bits:
            codes = levels.to(torch.float8_e4m3fn)
        else:
            nibbles = torch.bucketize(levels.abs(), torch.tensor(FP4_LEVELS)).to(torch.uint8)
            nibbles |= levels.signbit().to(torch.uint8) << 3
            codes = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        return {self.codec.codes_name(self.spec): codes} | dict(scales.stored)
