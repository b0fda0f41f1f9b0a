"""nf4: four bits a weight, as bitsandbytes stores and computes them.

Parts of `X.weight` of shape (N, K), M = N*K, B = ceil(M/64) blocks of the flattened matrix (bitsandbytes 0.50.2,
`QuantState.as_dict(packed=True)`):

    X.weight                                    U8  (ceil(M/2), 1)   two codes a byte, first in the high nibble
    X.weight.absmax                             F32 (B,)             or U8 with double_quant
    X.weight.quant_map                          F32 (16,)            the code book
    X.weight.nested_absmax                      F32 (ceil(B/256),)   double_quant only
    X.weight.nested_quant_map                   F32 (256,)           double_quant only
    X.weight.quant_state.bitsandbytes__nf4      U8                   JSON

With scale "absmax" every byte equals `bitsandbytes.functional.quantize_4bit` of that version on CPU (on one thread:
see kernels/nested_kernels.py), with one addition: `nested_offset` is a number in the JSON text, so with double_quant
the JSON is padded with spaces to the longest text a number can have. JSON readers skip them, and the sizes of a plan
are those of the file. Also bitsandbytes' treatment of a short last block and of an odd M is matched.

Scale "mse" picks each block's scale for least squared error; the form, and so every loader, is the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bagel_compress.codecs.base import Chunk, Encoding, Reader, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec
from bagel_compress.codecs.constants import NF4_BLOCK, NF4_NESTED_BLOCK
from bagel_compress.codecs.grid import Curvature, Grid, Levels, Scales, block_absmax, searched
from bagel_compress.codecs.loaders import Loader, bitsandbytes, vllm_omni
from bagel_compress.codecs.matrix import (
    CHUNK_ELEMENTS,
    MatrixCodec,
    check_shapes,
    memory_for_codes,
    not_finite,
    read_words,
    self_check,
)
from bagel_compress.codecs.traits import FormName, OnnxCodes, Snippet, part_note
from bagel_compress.errors import CodecError, ExportError
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

STATE = "quant_state.bitsandbytes__nf4"
OFFSET_TEXT = 22  # characters of the longest Python text of a non-negative fp32 number, as in 1.1754943508222875e-38
DECODE_BLOCKS = 1 << 16  # blocks decoded at a time: bounds the temporaries to a few times 16 MB


class Nf4(CalibratedCodec, MatrixCodec):
    """bitsandbytes NF4, block 64."""

    format: Literal["nf4"] = "nf4"
    double_quant: bool = False
    scale: Literal["absmax", "mse"] = "absmax"
    tag: ClassVar[str] = "4-bit"

    @property
    def normal_error(self) -> float:
        return 0.086 if self.scale == "mse" else 0.092

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        (spec,) = unit.specs
        blocks = -(-spec.numel // NF4_BLOCK)
        parts = {
            "": PartSpec("U8", (-(-spec.numel // 2), 1)),
            "absmax": PartSpec("U8" if self.double_quant else "F32", (blocks,)),
            "quant_map": PartSpec("F32", (16,)),
            STATE: PartSpec("U8", (len(_state(spec, 0.0 if self.double_quant else None)),)),
        }
        if self.double_quant:
            parts["nested_absmax"] = PartSpec("F32", (-(-blocks // NF4_NESTED_BLOCK),))
            parts["nested_quant_map"] = PartSpec("F32", (256,))
        return {part_name(spec, key): part for key, part in parts.items()}

    def begin(self, unit: Unit, source: Reader) -> Encoding:
        return _Nf4Encoding(codec=self, parts=self.parts(unit), spec=unit.specs[0], source=source)

    def grid(self, spec: TensorSpec) -> Grid | None:
        return None if spec.shape[1] % NF4_BLOCK else _Nf4Grid(self, spec)

    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """bf16(code book * absmax), the product in fp32: `bitsandbytes.functional.dequantize_4bit`, bit for bit."""
        (spec,) = unit.specs
        absmax = stored_absmax(self, spec, parts)
        return {spec.name: decode_codes(parts[spec.name], absmax, spec.shape)}

    def config(self, units: Sequence[Unit], others: Sequence[str]) -> dict[str, Any]:
        """`transformers.BitsAndBytesConfig.to_dict()`, without its private keys."""
        return {
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": self.double_quant,
                "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_quant_storage": "uint8",
                "llm_int8_skip_modules": list(others),
            }
        }

    def linear(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> torch.nn.Module:
        import torch

        from bagel_compress.codecs.linears import is_fake
        from bagel_compress.codecs.nf4_linear import Nested, Nf4Linear

        check_shapes(self, Unit(spec.name, (spec,)), parts)
        codes, nested = parts[spec.name], None
        offset = 0.0 if is_fake(codes) else nested_offset(spec, parts)  # also checks that the text is of this weight
        if self.double_quant:
            number = torch.full((), offset or 0.0, dtype=torch.float32, device=codes.device)
            absmax, values = (parts[part_name(spec, key)] for key in ("nested_absmax", "nested_quant_map"))
            nested = Nested(absmax, values, number)
        return Nf4Linear(spec, codes, parts[part_name(spec, "absmax")], nested, bias, decode_codes, unnest)

    def loaders(self) -> list[Loader]:
        return [
            bitsandbytes("any", "tests/pipeline/test_foreign.py::test_bitsandbytes_loads_nf4"),
            vllm_omni("its bitsandbytes method quantises at load and reads no stored codes"),
        ]

    def snippets(self, repo: str, tensor: str, shard: str, alone: bool) -> list[Snippet]:
        text = f"""
import bitsandbytes as bnb
from huggingface_hub import hf_hub_download
from safetensors import safe_open

name = "{tensor}"
with safe_open(hf_hub_download("{repo}", "{shard}"), "pt") as shard:
    stored = {{key.removeprefix(name + "."): shard.get_tensor(key) for key in shard.keys() if key.startswith(name)}}
weight = bnb.nn.Params4bit.from_prequantized(stored.pop(name), stored, device="cpu")
print(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
"""
        return [Snippet("bitsandbytes", text, ("bitsandbytes",), note=part_note("4-bit weight"))]

    def onnx_form(self, tensor: str, runtime: str, activations: str) -> FormName:
        if runtime != "onnxruntime":
            raise ExportError(
                f"{tensor}: TensorRT has no NF4 operator, and unpacked NF4 codes save no memory there;"
                " build an int4 artifact for it, or export this one for onnxruntime."
            )
        return "bnb4"

    def onnx_codes(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> OnnxCodes:
        """bitsandbytes' packed bytes as they are, and absmax, un-nested, (blocks,)."""
        return OnnxCodes(parts[spec.name].reshape(-1).numpy(), stored_absmax(self, spec, parts).float(), "UINT8")


def part_name(spec: TensorSpec, key: str) -> str:
    """Full name of a part; the empty key is the weight itself."""
    return f"{spec.name}.{key}" if key else spec.name


def stored_absmax(codec: Nf4, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(B,) fp32 absmax of stored parts, un-nested. Raises CodecError if the parts are not those of `spec`."""
    import torch

    check_shapes(codec, Unit(spec.name, (spec,)), parts)
    absmax, offset = parts[part_name(spec, "absmax")], nested_offset(spec, parts)
    if offset is None:
        return absmax
    nested, values = parts[part_name(spec, "nested_absmax")], parts[part_name(spec, "nested_quant_map")]
    return unnest(absmax, nested, values, torch.tensor(offset, dtype=torch.float32, device=absmax.device))


def unnest(codes: torch.Tensor, nested: torch.Tensor, values: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """(B,) uint8 codes, (B/256,) nested absmax, (256,) values -> (B,) fp32 absmax; each step rounded to fp32."""
    return values[codes.int()] * nested.repeat_interleave(NF4_NESTED_BLOCK)[: codes.numel()] + offset


def decode_codes(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Packed codes and fp32 absmax -> bf16 of `shape`."""
    import torch

    packed = packed.reshape(-1)
    pairs = _pair_values(packed.device)
    out = torch.empty(packed.numel() * 2, dtype=torch.bfloat16, device=packed.device)
    for first in range(0, absmax.numel(), DECODE_BLOCKS):
        scale = absmax[first : first + DECODE_BLOCKS]
        codes = packed[first * NF4_BLOCK // 2 : (first + scale.numel()) * NF4_BLOCK // 2]
        values = pairs[codes.int()].reshape(-1)
        scale = scale.repeat_interleave(NF4_BLOCK)[: values.numel()]
        out[first * NF4_BLOCK : first * NF4_BLOCK + values.numel()] = values * scale
    return out[: math.prod(shape)].reshape(shape)


def nested_offset(spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> float | None:
    """The mean of absmax that double quantisation took out, None without it. Checks the quant_state on the way."""
    text = bytes(parts[part_name(spec, STATE)].cpu().numpy())
    try:
        state = json.loads(text)
    except ValueError as error:
        raise CodecError(f"{spec.name}: its quant_state is not JSON ({error}); the artifact is damaged.") from error
    offset: float | None = state.get("nested_offset") if isinstance(state, dict) else None
    if text.rstrip() != _state(spec, offset).rstrip():
        raise CodecError(
            f"{spec.name}: quant_state {text!r} does not describe an nf4 matrix of shape {list(spec.shape)}."
        )
    return offset


class _Nf4Grid(Grid):
    """Blocks along the rows: of a width of whole blocks."""

    block = NF4_BLOCK

    def __init__(self, codec: Nf4, spec: TensorSpec) -> None:
        from bagel_compress.codecs.kernels.nf4_kernels import CODE_BOOK

        self.codec, self.spec = codec, spec
        self.levels = Levels(table=tuple(CODE_BOOK.tolist()))

    def scales(self, weights: torch.Tensor, curvature: Curvature) -> Scales:
        import torch

        from bagel_compress.codecs.kernels.nested_kernels import dequantize_absmax, dynamic_map, quantize_absmax

        absmax = block_absmax(weights, NF4_BLOCK)
        if self.codec.scale == "mse":
            absmax = searched(self, weights, curvature, lambda factor: absmax * factor)
        if not self.codec.double_quant:
            return Scales(absmax, self._stored({"absmax": absmax.cpu().reshape(-1)}, None))
        codes, nested, offset = quantize_absmax(absmax.cpu().reshape(-1).numpy())
        if not math.isfinite(offset):
            raise CodecError(f"{self.spec.name}: weights of {absmax.max()} are too large for double_quant; use raw.")
        final = torch.from_numpy(dequantize_absmax(codes, nested, offset)).reshape(absmax.shape).to(weights.device)
        parts = {"absmax": codes, "nested_absmax": nested, "nested_quant_map": dynamic_map()}
        return Scales(final, self._stored({key: torch.from_numpy(part) for key, part in parts.items()}, float(offset)))

    def pack(self, levels: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        import torch

        book = torch.tensor(self.levels.table)
        codes = torch.searchsorted(book, levels.cpu().contiguous()).to(torch.uint8).reshape(-1, 2)
        return {self.spec.name: (codes[:, :1] << 4) | codes[:, 1:]} | dict(scales.stored)

    def _stored(self, parts: Mapping[str, torch.Tensor], offset: float | None) -> dict[str, torch.Tensor]:
        import torch

        state = torch.frombuffer(bytearray(_state(self.spec, offset)), dtype=torch.uint8)
        named = {**parts, "quant_map": torch.tensor(self.levels.table), STATE: state}
        return {part_name(self.spec, key): part for key, part in named.items()}


@dataclass(slots=True, kw_only=True)
class _Nf4Encoding(Encoding):
    codec: Nf4
    spec: TensorSpec
    source: Reader

    def chunks(self) -> Iterator[Chunk]:
        import numpy as np

        from bagel_compress.codecs.kernels.nf4_kernels import CODE_BOOK

        spec, statistics = self.spec, []
        for start in range(0, spec.numel, CHUNK_ELEMENTS):
            words = read_words(self.source, spec, start, min(start + CHUNK_ELEMENTS, spec.numel))
            written = memory_for_codes(1, -(-words.size // 2)).reshape(-1)
            absmax, energies, errors = _encode(words, self.codec, written)
            if not np.isfinite(absmax).all():
                raise not_finite(spec, self.codec)
            self_check(spec, self.codec, energies[:, 2].max() <= 0)
            signal, noise, _ = energies.sum(0).tolist()
            yield Chunk(spec.name, start // 2, written, given=True)
            if self.codec.double_quant:
                self.quality.add(signal, 0.0)
                statistics.append((absmax, errors))
            else:
                self.quality.add(signal, noise)
                yield self._chunk("absmax", absmax, start // NF4_BLOCK * 4)
        yield self._chunk("quant_map", CODE_BOOK)
        offset = (yield from self._nest(statistics)) if statistics else None
        yield self._chunk(STATE, np.frombuffer(_state(spec, offset), np.uint8))

    def _nest(self, statistics: Sequence[tuple[np.ndarray, np.ndarray]]) -> Generator[Chunk, None, float]:
        """From (absmax, errors) of all chunks. Only absmax is joined: errors are 12 bytes a block."""
        import numpy as np

        from bagel_compress.codecs.kernels.nested_kernels import dequantize_absmax, dynamic_map, quantize_absmax
        from bagel_compress.codecs.kernels.nf4_kernels import nested_noise

        absmax = np.concatenate([part for part, _ in statistics])
        codes, nested, offset = quantize_absmax(absmax)
        if not math.isfinite(offset):
            raise CodecError(f"{self.spec.name}: weights of {absmax.max()} are too large for double_quant; use raw.")
        yield self._chunk("absmax", codes)
        yield self._chunk("nested_absmax", nested)
        yield self._chunk("nested_quant_map", dynamic_map())
        stored, first = dequantize_absmax(codes, nested, offset), 0
        for part, errors in statistics:
            self.quality.add(0.0, nested_noise(part, stored[first : first + len(part)], errors))
            first += len(part)
        return float(offset)

    def _chunk(self, key: str, values: np.ndarray, start: int = 0) -> Chunk:
        return Chunk(part_name(self.spec, key), start, values.view("uint8"))


def _encode(words: np.ndarray, codec: Nf4, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole blocks on all threads, then the short last one, into `packed`.

    Returns absmax, energies and errors as `encode_blocks` describes them; the short block has a row of its own.
    """
    import numpy as np

    from bagel_compress.codecs.kernels.nf4_kernels import TILE, encode_blocks, encode_tail
    from bagel_compress.codecs.kernels.threads import split

    whole, tail = divmod(words.size, NF4_BLOCK)
    count, tiles = whole + (tail > 0), -(-whole // TILE)
    absmax, errors = np.empty(count, np.float32), np.empty((count if codec.double_quant else 0, 3), np.float32)
    energies = np.empty((tiles + (tail > 0), 3))
    blocks = words[: whole * NF4_BLOCK].reshape(whole, NF4_BLOCK)
    codes = packed[: whole * NF4_BLOCK // 2].reshape(whole, NF4_BLOCK // 2)

    def part(a: int, b: int) -> None:
        rows = slice(a * TILE, min(b * TILE, whole))
        encode_blocks(blocks[rows], codec.scale == "mse", codes[rows], absmax[rows], energies[a:b], errors[rows])

    split(part, tiles, 1)
    if tail:
        packed[whole * NF4_BLOCK // 2 :], absmax[whole], energies[tiles], last = encode_tail(words[whole * NF4_BLOCK :])
        errors[whole:] = last
    return absmax, energies, errors


def _state(spec: TensorSpec, offset: float | None) -> bytes:
    """The JSON of `QuantState.as_dict(packed=True)`; of fixed length for a shape."""
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "dtype": "bfloat16",
        "shape": list(spec.shape),
    }
    if offset is None:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NF4_NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode().ljust(len(json.dumps(state | {"nested_offset": 0})) - 1 + OFFSET_TEXT)


def _pair_values(device: torch.device) -> torch.Tensor:
    """(256, 2) fp32: the two code book values of a packed byte."""
    import torch

    from bagel_compress.codecs.kernels.nf4_kernels import CODE_BOOK

    book = torch.from_numpy(CODE_BOOK).to(device)
    return torch.stack([book.repeat_interleave(16), book.repeat(16)], 1)
