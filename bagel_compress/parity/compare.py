"""Compares a model with traces of its reference, and the distances with the limits of its recipe.

Every case runs twice: teacher-forced, to find the stage where the numbers begin to differ, and free, for the result
that a user would get. The linear modules are also compared one by one. Each value is reported with its limit and its
noise floor, the distance of the reference from itself when it is computed differently. A limit below the floor is an
error, since not even the reference would pass it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from bagel.sampler import Sampler
from bagel_compress.build.limits import Limit, Metric
from bagel_compress.build.speed_settings import SpeedPreset
from bagel_compress.codecs.base import Codec
from bagel_compress.errors import RecipeError
from bagel_compress.parity import replay
from bagel_compress.parity.attribution import attribute
from bagel_compress.parity.diagnose import Probes, diagnose_case, diagnose_modules, modules, probe_values
from bagel_compress.parity.distances import measure
from bagel_compress.parity.linear_probes import answers_to, probe
from bagel_compress.parity.network_metrics import Networks
from bagel_compress.parity.preset_rows import preset_rows
from bagel_compress.parity.report_data import LayerRounding, ParityReport
from bagel_compress.parity.trace import Trace, TraceFile
from bagel_compress.parity.verdict import floor_of, make_rows, not_measured, preset_limits, summary

NO_NETWORKS = Networks()
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """The loaded model under test, with what its manifest and recipe say about it."""

    sampler: Sampler
    name: str
    digest: str  # of the manifest
    level: str
    limits: Mapping[str, Limit]
    codecs: Mapping[str, Codec] = field(default_factory=dict)  # linear module path -> how it is stored
    rounding: Sequence[LayerRounding] = ()  # what calibrated rounding did, by layer
    presets: Mapping[str, SpeedPreset] = field(default_factory=dict)  # of the recipe, by name
    has_modules: bool = True  # False for exported graphs, whose linear modules cannot be run one by one


@dataclass(frozen=True, slots=True)
class Comparison:
    """A report, and its pictures: name of a case -> (reference's, candidate's, inputs ...), each uint8 [H, W, 3]."""

    report: ParityReport
    pictures: Mapping[str, tuple[Tensor, ...]]


def compare(
    candidate: Candidate,
    files: Sequence[TraceFile],
    reference: Sampler | None = None,
    progress: Progress | None = None,
    networks: Networks = NO_NETWORKS,
) -> Comparison:
    """Compares a model with all cases of some trace files.

    With the loaded `reference`, errors are also attributed to components. `networks` are LPIPS and CLIP, as far as the
    user gave weights. Raises TraceError on a trace of a model with other sizes; RecipeError on a limit below the noise
    floor, and on a limit for LPIPS or CLIP without their weights.
    """
    progress = progress or (lambda message: None)
    for metric, option in networks.absent.items():
        if metric in candidate.limits:
            raise RecipeError(f"limits: {metric} is limited, but it needs its weights; give them with {option}.")
    for file in files:
        file.expect_model(asdict(candidate.sampler.bagel.config))
    traces = [file.read(case) for file in files for case in file.header.cases]
    _check_limits_above_floor(candidate, traces)
    cases, faults, pictures = [], [], {}
    for trace in traces:
        progress(f"comparing {trace.case.name}")
        forced, free = replay.replay(candidate.sampler, trace), replay.rerun(candidate.sampler, trace)
        case = measure(trace, forced, free)
        cases.append(case.model_copy(update={"metrics": case.metrics | networks.metrics(free, trace)}))
        faults += diagnose_case(forced, trace)
        if "image" in trace.tensors:
            inputs = trace.series("picture")
            pictures[trace.case.name] = (trace.tensors["image"], free.tensors["image"], *inputs)
    progress("probing the linear modules")
    found, wanted = _probes(candidate, files)
    faults += diagnose_modules(found, wanted, candidate.codecs, candidate.limits.get(Metric.LINEAR_GAIN))
    if reference is not None:
        progress("attributing the error to components")
    probes = probe_values(found, wanted) if wanted.fixed else {}
    rows = make_rows(candidate.limits, candidate.level, cases, probes)
    limits = preset_limits(candidate.level, candidate.limits)
    rows_of_presets = tuple(preset_rows(candidate.sampler, candidate.presets, limits, traces, progress))
    report = ParityReport(
        artifact=candidate.digest,
        name=candidate.name,
        level=candidate.level,
        source=files[0].header.source,
        source_digest=files[0].header.source_digest,
        environment=_environment(candidate.sampler, files[0]),
        rows=(*rows, *rows_of_presets),
        cases=tuple(cases),
        shares=attribute(reference, candidate.sampler, traces) if reference is not None else (),
        modules=modules(found.fixed, wanted.fixed, candidate.codecs),
        rounding=tuple(candidate.rounding),
        faults=tuple(dict.fromkeys(faults)),
        missing=not_measured(candidate.limits, rows, cases, candidate.has_modules),
        notes=tuple(_notes(traces, networks)),
    )
    return Comparison(report, pictures)


def _probes(candidate: Candidate, files: Sequence[TraceFile]) -> tuple[Probes, Probes]:
    """Outputs of the candidate's linear modules and the recorded outputs of the reference's; none for graphs."""
    if not candidate.has_modules:
        return Probes({}), Probes({})
    recorded = [file.probes() for file in files]
    fixed = {path: answers for probes in recorded for path, answers in probes.fixed.items()}
    inputs = {path: rows for probes in recorded for path, rows in probes.inputs.items()}
    own = {path: torch.cat([fixed[path][:1], answers]) for p in recorded for path, answers in p.answers.items()}
    found = probe(candidate.sampler.bagel) if fixed else {}
    return Probes(found, answers_to(candidate.sampler.bagel, inputs, found)), Probes(fixed, own)


def _check_limits_above_floor(candidate: Candidate, traces: Sequence[Trace]) -> None:
    """Raises RecipeError if a limit is stricter than the noise floor."""
    for metric, limit in candidate.limits.items():
        floors = {
            t.case.name: floor
            for t in traces
            if (floor := floor_of(t.facts.floor.get(metric, {}), limit, candidate.level)) is not None
        }
        if not floors:
            continue
        worst = summary(limit, list(floors.values()))
        if not limit.holds(worst):
            side = "below" if limit.sense == "max" else "above"
            raise RecipeError(
                f"limits: {metric} is limited to {limit.value:g}, {side} the noise floor of {worst:.4g} (the reference"
                " against itself); no build can pass it, so loosen the limit or record with a finer dtype."
            )


def _environment(sampler: Sampler, file: TraceFile) -> dict[str, str]:
    device = sampler.bagel.device
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "dtype": str(sampler.bagel.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "reference device": file.header.device,
        "reference dtype": file.header.dtype,
        "reference torch": file.header.versions.get("torch", "unknown"),
    }


def _notes(traces: Sequence[Trace], networks: Networks) -> list[str]:
    notes = [f"{metric} was not measured: its weights were not given ({o})." for metric, o in networks.absent.items()]
    if any(not t.facts.floor for t in traces):
        notes.append("Some traces were recorded without a noise floor; their limits could not be checked against it.")
    return notes
