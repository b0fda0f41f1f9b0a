"""Trace: a case and the recorded run of the reference on it; and the file that holds traces of several cases.

A trace file is a safetensors file: it opens lazily and cannot run code. Its header names its origin (digest of the
source, sampler version, sizes of the model), so that a trace is never compared with another model. Tensors keep their
dtype. Their names, under `case/NAME/`:

    picture0 ..                      input pictures, uint8 [H, W, 3]
    noise0 ..                        normal draws in order: one per picture in an edit, then the initial x
    vae_latent0 ..                   VAE latents of the input pictures [z, h, w]
    ids, logits                      decoded ids (start token first), logits after each of the first ones [n, V]
    step12/x, t, v_cond, v_text, v_image, v      latents and time before step 12; velocities of the branches, guided one
    tap/EVENT/layer0 ..              some rows after each layer, for each prefill and some denoising steps
    latent, image                    final packed latent, picture uint8 [H, W, 3]

For the linear modules (linear_probes.py) there are `probe/MODULE`, the outputs for fixed inputs, and `own/MODULE` and
`own_answer/MODULE`, some inputs that the module got and its outputs for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bagel.errors import shown
from bagel_compress.errors import TraceError
from bagel_compress.io.atomic import atomic_path
from bagel_compress.io.yaml_model import FrozenModel
from bagel_compress.parity.report_data import Number
from bagel_compress.run.case import Case

SAMPLER_VERSION = "1"  # increased when a change of the sampler changes the tensors of a trace
METADATA_KEY = "bagel_trace"
PROBE_KINDS = ("probe", "own", "own_answer")


class CaseFacts(FrozenModel):
    """The recorded values of a case that are not tensors.

    `contexts` gives the number of tokens and the rope position of each guidance branch before denoising.
    """

    text: str | None = None
    contexts: dict[str, tuple[int, int]] = Field(default_factory=dict)
    passes: int = Field(default=0, description="times that the network was evaluated in denoising, branches counted")
    floor: dict[str, dict[str, Number]] = Field(
        default_factory=dict, description="metric -> the reference against itself, by what was changed"
    )


@dataclass(frozen=True, slots=True)
class Trace:
    """One case and its recorded run."""

    case: Case
    tensors: Mapping[str, Tensor]
    facts: CaseFacts = field(default_factory=CaseFacts)

    @property
    def steps(self) -> list[int]:
        """Indices of the recorded denoising steps."""
        return sorted(int(name[4:-2]) for name in self.tensors if name.startswith("step") and name.endswith("/x"))

    def series(self, stem: str) -> list[Tensor]:
        """Tensors stem0, stem1, ..."""
        found: list[Tensor] = []
        while (name := f"{stem}{len(found)}") in self.tensors:
            found.append(self.tensors[name])
        return found


class TraceHeader(FrozenModel):
    """The origin of a trace file, and the names of all its cases and tensors."""

    sampler: str = SAMPLER_VERSION
    source: str = Field(description="public name of the checkpoint")
    source_digest: str
    model: dict[str, Any] = Field(description="configuration of the model: sizes")
    dtype: str
    device: str
    versions: dict[str, str] = Field(default_factory=dict)
    cases: dict[str, Case] = Field(default_factory=dict)
    facts: dict[str, CaseFacts] = Field(default_factory=dict)
    tensors: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="case -> names of its tensors")


@dataclass(frozen=True, slots=True)
class RecordedProbes:
    """By path of a linear module: `fixed`, its outputs for fixed inputs (row 0 is for zeros); `inputs`, some inputs
    that it got; `answers`, its outputs for those."""

    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    answers: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in a trace file."""
        kinds = zip(PROBE_KINDS, (self.fixed, self.inputs, self.answers), strict=True)
        return {f"{kind}/{path}": tensor.contiguous() for kind, held in kinds for path, tensor in held.items()}


@dataclass(frozen=True, slots=True)
class TraceFile:
    """An opened trace file. Its header is in memory; tensors are read case by case."""

    path: Path
    header: TraceHeader

    @classmethod
    def open(cls, path: str | Path) -> TraceFile:
        """Reads the header. Raises TraceError if the file is no trace, is truncated, is of another sampler version, or
        lacks a tensor that its header names."""
        path = Path(path)
        if path.exists() and not path.is_file():
            raise TraceError(f"trace {path} is no file; record one with `bagel-compress trace`.")
        try:
            with safe_open(str(path), framework="pt") as handle:
                metadata, names = handle.metadata() or {}, set(handle.keys())
        except FileNotFoundError:
            raise TraceError(f"trace {path} does not exist; record one with `bagel-compress trace`.") from None
        except (SafetensorError, OSError) as error:
            raise TraceError(
                f"trace {path} is truncated or no safetensors file ({error}); record or copy it again."
            ) from None
        header = _header(path, metadata)
        if not header.cases or any(set(t) != set(header.cases) for t in (header.tensors, header.facts)):
            raise TraceError(f"trace {path} names no cases, or not the same ones everywhere; record it again.")
        if other := next((key for key, case in header.cases.items() if key != case.name), None):
            raise TraceError(f"trace {path} calls a case {other}, which is not its name; record it again.")
        for case, tensors in header.tensors.items():
            if missing := sorted({f"case/{case}/{name}" for name in tensors} - names):
                raise TraceError(f"trace {path} lacks {missing[0]} of case {case}; record it again.")
        return cls(path, header)

    def read(self, case: str) -> Trace:
        """The trace of one case."""
        prefix = f"case/{case}/"
        with safe_open(str(self.path), framework="pt") as handle:
            tensors = {name: handle.get_tensor(prefix + name) for name in self.header.tensors[case]}
        return Trace(self.header.cases[case], tensors, self.header.facts[case])

    def probes(self) -> RecordedProbes:
        """The recorded probes of the linear modules."""
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in PROBE_KINDS}
        with safe_open(str(self.path), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                kind, _, module = name.partition("/")
                if kind in found:
                    found[kind][module] = handle.get_tensor(name)
        return RecordedProbes(*found.values())

    def expect_source(self, digest: str, what: str) -> None:
        """Raises TraceError unless the trace was recorded from the checkpoint with this digest.

        `what` names in the message the model that has the digest.
        """
        if digest != self.header.source_digest:
            raise TraceError(
                f"trace {self.path} was recorded from {self.header.source} ({self.header.source_digest[:12]}), but"
                f" {what} comes from another checkpoint ({digest[:12]}); record a trace from its source."
            )

    def expect_model(self, model: Mapping[str, Any]) -> None:
        """Raises TraceError unless the model's configuration equals that of the recorded model."""
        found, wanted = _flat(json.loads(json.dumps(model))), _flat(self.header.model)
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise TraceError(
                    f"trace {self.path} was recorded with {key} = {wanted.get(key)}, the model has {found.get(key)};"
                    " record a trace from this model's source."
                )


def save(path: Path, header: TraceHeader, traces: list[Trace], probes: RecordedProbes | None = None) -> None:
    """Writes a trace file, under a temporary name until it is complete. `header` needs no cases, facts or tensors."""
    tensors = {f"case/{t.case.name}/{name}": tensor.clone() for t in traces for name, tensor in t.tensors.items()}
    tensors |= {} if probes is None else probes.tensors()
    header = header.model_copy(
        update={
            "cases": {t.case.name: t.case for t in traces},
            "facts": {t.case.name: t.facts for t in traces},
            "tensors": {t.case.name: tuple(sorted(t.tensors)) for t in traces},
        }
    )
    with atomic_path(path) as partial:
        save_file(tensors, str(partial), metadata={METADATA_KEY: header.model_dump_json()})


def common_dtype(files: Sequence[TraceFile]) -> torch.dtype:
    """The dtype that the traces were recorded in; raises TraceError if they differ."""
    names = sorted({file.header.dtype for file in files})
    if len(names) != 1:
        raise TraceError(f"the traces were recorded in {' and '.join(names)}; give traces of one dtype.")
    dtype: torch.dtype = getattr(torch, names[0])
    return dtype


def image_tensor(picture: Any) -> Tensor:
    """A PIL picture as uint8 [H, W, 3]."""
    import numpy as np

    return torch.from_numpy(np.array(picture, dtype=np.uint8))


def _header(path: Path, metadata: Mapping[str, str]) -> TraceHeader:
    if METADATA_KEY not in metadata:
        raise TraceError(
            f"{path} is no trace: its header has no {METADATA_KEY}; record one with `bagel-compress trace`."
        )
    try:
        raw = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        raise TraceError(f"trace {path} has a damaged header, which is no JSON object; record it again.")
    if raw.get("sampler") != SAMPLER_VERSION:
        raise TraceError(
            f"trace {path} was recorded with sampler version {shown(raw.get('sampler'))}, this is version"
            f" {SAMPLER_VERSION}; record it again."
        )
    try:
        return TraceHeader.model_validate(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise TraceError(f"trace {path} has a damaged header ({where}: {fault['msg']}); record it again.") from None


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, Mapping):
        return {k: v for key, value in data.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: data}
