"""The codec contract: what a format must answer, from a header, from data, and at run time.

A codec is a frozen value: the same object is the YAML entry of a recipe, the entry of the manifest and the decoder.
It is given *units*: one tensor for most formats, an ordered group for DF11, whose code book covers several tensors.

Data is read as flat runs of elements through a `Reader` and leaves as `Chunk`s, so that a tensor of any size is coded
in bounded memory. `encode` is the same path on tensors in memory, and `decode` defines the format: every kernel and
every run-time module is compared to it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from bagel_compress.codecs.loaders import Loader
from bagel_compress.codecs.traits import FormName, OnnxCodes, Snippet
from bagel_compress.errors import ExportError
from bagel_compress.io.tensor_spec import DTYPE_BYTES, PartSpec, TensorSpec
from bagel_compress.io.yaml_model import FrozenModel

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True)
class Unit:
    """What one code book or scale set covers: ordered tensors under one name (the tensor's own name if it is one)."""

    name: str
    specs: tuple[TensorSpec, ...]

    @property
    def numel(self) -> int:
        return sum(s.numel for s in self.specs)


@runtime_checkable
class Reader(Protocol):
    """Gives the values of a tensor, wherever they lie."""

    def read(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor: 1-D, CPU, dtype of `spec`; a view if possible."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of bytes of one stored part. `data` is contiguous uint8, valid until the next chunk is asked for.

    `lasting`: the array is never written to again, so the caller may keep it. `given`: not before the caller has let go
    of it, which should be soon, since its memory is used again (`matrix.memory_for_codes`). `direct`: the codec goes on
    encoding in threads of its own, so the caller may write this chunk to disk before it asks for the next without
    delaying the encoding.
    """

    part: str
    start: int
    data: np.ndarray
    lasting: bool = False
    given: bool = False
    direct: bool = False


@dataclass(frozen=True, slots=True)
class LaterChunk:
    """A chunk whose bytes are read when they are written, so that it takes no memory while it waits."""

    part: str
    start: int
    nbytes: int
    read: Callable[[], np.ndarray]

    @property
    def data(self) -> np.ndarray:
        """The bytes; reads them."""
        return self.read()


@dataclass(slots=True)
class Quality:
    """Energy of a unit's weights and of the coding error, as decoded from the codes that were written."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, signal: float, noise: float) -> None:
        self.signal += signal
        self.noise += noise

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in dB; infinite where nothing was lost."""
        if self.noise == 0.0:
            return math.inf
        return 10.0 * math.log10(self.signal / self.noise) if self.signal > 0.0 else -math.inf


class Rounded(FrozenModel):
    """What a rounding method did to one weight: an entry of the manifest.

    Errors are squared and relative: tr(E H E^T) / tr(W H W^T), with E the error of the decoded weight and H the second
    moments of the layer's inputs, so their square roots are relative errors of the layer's output.
    """

    method: str
    rows: int  # rows of inputs that H is of
    damping: float  # what was added to the diagonal of H, in units of its mean; the largest of all blocks
    error: float
    nearest: float  # the same grid and scales, each weight rounded alone
    predictor: float  # sqrt(tr D / tr H), H = (I + U) D (I + U)^T: what of nearest's error feedback leaves, on average


@dataclass(slots=True)
class Encoding(ABC):
    """One unit on its way into a shard. `parts` is exact before the first chunk is asked for."""

    codec: Codec  # the codec really used; differs from the asked one only with a `reason`
    parts: dict[str, PartSpec]
    reason: str = ""
    quality: Quality = field(default_factory=Quality)  # complete when `chunks` is exhausted
    rounded: Rounded | None = None  # of calibrated rounding

    @abstractmethod
    def chunks(self) -> Iterator[Chunk | LaterChunk]:
        """The bytes of all parts, each byte once, in any order. Verifies what it wrote, or raises CodecError."""


class Codec(FrozenModel, ABC):
    """Base of all formats. Subclasses are one file each and are listed in `bagel_compress.codecs.CODECS`.

    Nothing outside this package asks for a format by its name: what differs between formats is an attribute or a method
    here. A new format gives `format`, `check`, `parts`, `begin` and `decode`. The rest has defaults:

    attribute or method    who asks for it               default
    lossless               parity's limits, model card False
    exact                  plan                          True: sizes follow from the header
    stored_as_is           load, budget, model card      False: it has codes (True: raw alone)
    scans_folder           compress                      False: the VAE may lie beside the weights
    movable                offload, device maps, budget  True: a unit may wait in host memory
    tag                    model card                    "": no tag for the width of its codes
    units                  plan                          one unit per tensor
    likely_parts           budget                        `parts`
    sampled                plan                          `nbytes`
    config                 compress (config.json)        nothing
    linear, linears        load                          holds the parts, decodes them in every call
    embedding              load                          decodes once
    ring_units             budget                        none: decodes nothing into the shared ring
    fake_embedding         budget                        None: a table is decoded at loading
    fake_linears           budget                        `linears` over fake tensors
    snippets               model card                    nothing
    loaders                inspect, model card           nothing
    comfyui_format         ComfyUI file                  "": a full-precision tensor there
    comfyui_values         ComfyUI file                  ExportError
    onnx_form, onnx_codes  export                        decoded where lossless, else ExportError
    least_capability       TensorRT export               0: every GPU can multiply with its codes
    normal_error           advise                        0 where lossless, else unknown
    served                 recipe                        True where it is stored as it is
    """

    format: str  # narrowed to a Literal by each subclass: the YAML name
    lossless: ClassVar[bool] = False
    exact: ClassVar[bool] = True  # False: `parts` and `nbytes` are upper bounds until the data was seen
    stored_as_is: ClassVar[bool] = False  # True: the parts are the tensors themselves
    scans_folder: ClassVar[bool] = False  # True: its reader loads every *.safetensors beside the weights; VAE to vae/
    # False: the run-time modules own their device memory, so a unit is loaded where it runs and stays there.
    movable: ClassVar[bool] = True
    tag: ClassVar[str] = ""  # what the Hub calls the width of the codes, such as "4-bit"
    comfyui_format: ClassVar[str] = ""  # ComfyUI's name of the format in the metadata of its files
    least_capability: ClassVar[int] = 0  # first CUDA compute capability, times ten, with this type in TensorRT

    @classmethod
    def name(cls) -> str:
        """The format's name, as recipes write it."""
        return str(cls.model_fields["format"].default)

    def units(self, specs: Sequence[TensorSpec]) -> list[Unit]:
        """Groups the tensors that a rule gave to this codec. Default: one unit per tensor."""
        return [Unit(s.name, (s,)) for s in specs]

    @abstractmethod
    def check(self, unit: Unit) -> None:
        """From the header alone. Raises PlanError, naming the tensor, if this format cannot hold it."""

    @abstractmethod
    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        """Names and specs of what will be stored, in full names; exact, or an upper bound where the data decides."""

    def nbytes(self, unit: Unit) -> int:
        """Bytes of `parts`."""
        return sum(p.nbytes for p in self.parts(unit).values())

    def likely_parts(self, unit: Unit) -> dict[str, PartSpec]:
        """What will be stored for usual weights, where there is no data to sample; default: `parts`."""
        return self.parts(unit)

    def sampled(self, unit: Unit, source: Reader) -> int:
        """A size in bytes, from a sample of the data, that the stored unit hardly ever exceeds; default: `nbytes`."""
        return self.nbytes(unit)

    @property
    def normal_error(self) -> float | None:
        """Relative error (root mean square) of normal weights in rows of 3584, each rounded alone; None: unknown."""
        return 0.0 if self.lossless else None

    @property
    def served(self) -> bool:
        """Does vLLM-Omni load weights of this format?"""
        return self.stored_as_is

    @abstractmethod
    def begin(self, unit: Unit, source: Reader) -> Encoding:
        """Starts coding: reads what is needed to know the exact parts. Raises CodecError on values it cannot hold."""

    @abstractmethod
    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Stored parts -> tensors in the unit's shapes and dtypes. Raises CodecError on parts that make no sense."""

    def encode(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`begin` and `chunks` on tensors in memory: parts by full name. For tests, kernels and small tensors."""
        import torch

        encoding = self.begin(unit, InMemory(tensors))
        stored = {n: torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype]()) for n, part in encoding.parts.items()}
        raw = {n: t.view(-1).view(torch.uint8).numpy() for n, t in stored.items() if t.numel()}
        for chunk in encoding.chunks():
            if (data := chunk.data).size:
                raw[chunk.part][chunk.start : chunk.start + data.nbytes] = data
        return stored

    def config(self, units: Sequence[Unit], others: Sequence[str]) -> dict[str, Any]:
        """Entries for the artifact's `config.json` by which this format's own readers know it; default: none.

        `units` are all units stored in this format, `others` the names of the linear modules that are not (for skip
        lists). Example: {"quantization_config": {"quant_method": "bitsandbytes", ...}}.
        """
        return {}

    def linear(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> torch.nn.Module:
        """Run-time module computing x @ W.T + bias. Default: hold the stored parts and `decode` them in every call."""
        from bagel_compress.codecs.linears import StoredLinear

        return StoredLinear(self, spec, parts, bias)

    def linears(
        self, unit: Unit, parts: Mapping[str, torch.Tensor], biases: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.nn.Module]:
        """Run-time modules of all weights of a unit of linear weights, by tensor name; `biases` by weight name."""
        return {spec.name: self.linear(spec, parts, biases.get(spec.name)) for spec in unit.specs}

    def embedding(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> torch.nn.Module | None:
        """Run-time module of an embedding table that looks rows up in the stored form; default: None, decode it."""
        return None

    def fake_embedding(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> torch.nn.Module | None:
        """`embedding` for a prediction of memory, which can decode nothing: a module that holds the parts."""
        return None

    @classmethod
    def ring_units(cls, units: Iterable[Unit]) -> list[tuple[str, int]]:
        """Name and weights of what run-time modules of these units decode into the ring of ring.py, which all share."""
        return []

    def fake_linears(
        self,
        unit: Unit,
        parts: Mapping[str, torch.Tensor],
        biases: Mapping[str, torch.Tensor],
        scratch: torch.Tensor | None,
    ) -> dict[str, torch.nn.Module]:
        """`linears` over fake tensors, which have shapes and no values: memory is predicted by running them.

        `scratch` is the ring, 1-D uint8, None where no unit needs it. A format whose decoder reads values, and
        so cannot run on fake tensors, gives modules that allocate what the real ones would. The modules of a format
        that is not `movable` hold no stored bytes: the prediction adds those itself.
        """
        return self.linears(unit, parts, biases)

    def snippets(self, repo: str, tensor: str, shard: str, alone: bool) -> list[Snippet]:
        """How other packages open what is stored in this format, for the model card; default: no other package does.

        `repo` is a Hub id, `tensor` one weight that is stored in this format and `shard` its file. `alone`: everything
        else in the artifact is stored as it is.
        """
        return []

    def loaders(self) -> list[Loader]:
        """Which other loaders open an artifact whose one format this is, and how that is known; default: none does."""
        return []

    def comfyui_values(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Stored parts -> tensors of a ComfyUI file by name. Raises ExportError where ComfyUI has no such format."""
        raise ExportError(
            f"{unit.name} is {self.format}; a ComfyUI file holds nvfp4, mxfp8, int8, fp8 and bf16: use recipe "
            "comfyui-nvfp4, mxfp8-24gb, comfyui-int8 or fp8-comfyui."
        )

    def onnx_form(self, tensor: str, runtime: str, activations: str) -> FormName:
        """How an export carries a weight on this runtime (`bagel_compress.run.export_settings` has their names).

        Raises ExportError, naming the tensor, where the runtime cannot compute with this format.
        """
        if self.lossless:
            return "dense"
        raise ExportError(f"{tensor}: codec {self.format} has no ONNX form; give it another codec, such as int8.")

    def onnx_codes(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> OnnxCodes:
        """The codes of a weight for every form but dense."""
        raise ExportError(f"{spec.name}: codec {self.format} has no ONNX form; give it another codec, such as int8.")


class InMemory:
    """A Reader over tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def read(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        return self._tensors[spec.name].contiguous().reshape(-1)[start:stop]


def _torch_dtype(name: str):  # type: ignore[no-untyped-def]
    def get() -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, name)
        return dtype

    return get


# safetensors dtype code -> function giving the torch dtype (a function, so that plans need no torch).
TORCH_DTYPES = {
    code: _torch_dtype(name)
    for code, name in {
        "U64": "uint64", "I64": "int64", "F64": "float64", "F32": "float32", "U32": "uint32", "I32": "int32",
        "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    }.items()
}  # fmt: skip
assert TORCH_DTYPES.keys() == DTYPE_BYTES.keys()


def dtype_code(dtype: torch.dtype) -> str:
    """torch dtype -> safetensors code."""
    for code, get in TORCH_DTYPES.items():
        if get() == dtype:
            return code
    raise KeyError(dtype)
