"""Records traces of a reference: the cases, the probes of its linear modules and the noise floor. A run can be resumed.

The noise floor is the distance of the reference from itself when it is computed differently: with another attention
kernel and the guidance branches merged into one pass, and in fp32 instead of bf16 (or the reverse). It is measured
while recording, so that an artifact can be validated on a small machine without loading the reference.
"""

from __future__ import annotations

import copy
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bagel.layers import attention_kernel
from bagel.sampler import Sampler
from bagel_compress.errors import TraceError
from bagel_compress.parity import replay
from bagel_compress.parity.distances import measure
from bagel_compress.parity.linear_probes import answers_to, own_inputs, probe
from bagel_compress.parity.trace import RecordedProbes, Trace, TraceFile, TraceHeader, save
from bagel_compress.run.case import Case

FLOORS = ("repeat", "kernel", "dtype")
Progress = Callable[[str], None]


def record_cases(
    sampler: Sampler,
    source: str,
    source_digest: str,
    cases: Sequence[tuple[Case, Path]],
    out: str | Path,
    floors: Sequence[str] = FLOORS,
    progress: Progress | None = None,
) -> TraceFile:
    """Records cases (each with the folder of its pictures) into the file `out` and opens it.

    `source` and `source_digest` name the checkpoint that the sampler was loaded from (Checkpoint.name and .digest).
    Finished cases are stored in a folder beside the file until it is complete, so that an interrupted run continues
    after the last of them. Raises TargetError on a case that this model cannot run.
    """
    out, progress = Path(out), progress or (lambda message: None)
    header = _header(sampler, source, source_digest)
    parts = out.with_name(out.name + ".parts")
    traces = []
    for case, folder in cases:
        part = parts / f"{case.name}.safetensors"
        done = _finished(part, header, case, floors) or _finished(out, header, case, floors)
        if done is None:
            progress(f"recording {case.name}")
            trace = replay.record(sampler, case, folder)
            done = replace(trace, facts=trace.facts.model_copy(update={"floor": _floors(sampler, trace, floors)}))
            save(part, header, [done])
        traces.append(done)
    progress("probing the linear modules")
    save(out, header, traces, _probes(sampler, traces))
    shutil.rmtree(parts, ignore_errors=True)
    return TraceFile.open(out)


def _probes(sampler: Sampler, traces: Sequence[Trace]) -> RecordedProbes:
    fixed, inputs = probe(sampler.bagel), own_inputs(sampler, traces)
    answers = answers_to(sampler.bagel, inputs, fixed)
    return RecordedProbes(fixed, inputs, {path: rows[1:] for path, rows in answers.items()})


def _header(sampler: Sampler, source: str, digest: str) -> TraceHeader:
    device = sampler.bagel.device
    return TraceHeader(
        source=source,
        source_digest=digest,
        model=asdict(sampler.bagel.config),
        dtype=str(sampler.bagel.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        versions={
            "torch": torch.__version__,
            "bagel-compress": version("bagel-compress"),
            "python": platform.python_version(),
        },
    )


def _finished(path: Path, header: TraceHeader, case: Case, floors: Sequence[str]) -> Trace | None:
    """The trace of this case in an earlier file; None if source, machine, case or noise floors differ."""
    try:
        file = TraceFile.open(path)
    except TraceError:
        return None
    there = file.header
    same = (there.source_digest, there.dtype, there.device, there.versions) == (
        header.source_digest, header.dtype, header.device, header.versions,
    )  # fmt: skip
    if not same or case.name not in there.cases or there.cases[case.name].digest != case.digest:
        return None
    trace = file.read(case.name)
    known = {kind for values in trace.facts.floor.values() for kind in values}
    return trace if set(floors) <= known else None


def _floors(sampler: Sampler, trace: Trace, floors: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metric -> kind of change (FLOORS) -> distance of the reference from itself."""
    floor: dict[str, dict[str, float]] = {}
    for kind in floors:
        with computed_differently(sampler, kind) as other:
            measured = measure(trace, replay.replay(other, trace), replay.rerun(other, trace))
        for metric, value in measured.metrics.items():
            floor.setdefault(metric, {})[kind] = value
    return floor


@contextmanager
def computed_differently(sampler: Sampler, kind: str) -> Iterator[Sampler]:
    """The same model computed differently.

    `kind` is "repeat" (no change), "kernel" (another attention kernel, merged branches) or "dtype" (fp32, or bf16 for a
    reference in fp32).
    """
    other = Sampler(sampler.bagel, sampler.vae, sampler.text)
    if kind == "dtype":
        finer = torch.float32 if sampler.bagel.dtype != torch.float32 else torch.bfloat16
        other.bagel = copy.deepcopy(sampler.bagel).to(finer)
        yield other
    elif kind == "kernel":
        other.merge_branches = True
        with attention_kernel("exact"), sdpa_kernel(SDPBackend.MATH):  # the first for the model, the second for the VAE
            yield other
    else:
        yield other
