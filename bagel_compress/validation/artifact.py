"""Compares an artifact with traces of its source and writes the reports into its folder.

reports/parity.json      all values, for programs         reports/CASE.png    reference, artifact, difference
reports/junit.xml        one test per limit               report.html         the report as a page
reports/summary.md       for the page of a CI run
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bagel.layout import official_role
from bagel.loading import parameter_path
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.limits import resolve
from bagel_compress.codecs.base import Codec, Rounded
from bagel_compress.errors import TargetError
from bagel_compress.io.atomic import atomic_path
from bagel_compress.io.digests import blake3_file
from bagel_compress.parity.compare import NO_NETWORKS, Candidate, Comparison, Progress, compare
from bagel_compress.parity.network_metrics import Networks
from bagel_compress.parity.record import FLOORS, record_cases
from bagel_compress.parity.report_data import REPORTS, LayerRounding, ParityReport
from bagel_compress.parity.trace import TraceFile, common_dtype
from bagel_compress.report.files import write_pages
from bagel_compress.run.case import Case
from bagel_compress.run.device_map import DeviceChoice, DeviceMap
from bagel_compress.run.load import load, load_checkpoint
from bagel_compress.source.checkpoint import Checkpoint

if TYPE_CHECKING:
    from PIL import Image

DIFFERENCE_GAIN = 4  # of the difference in reports/CASE.png


def record_source(
    source: str | Path | Checkpoint,
    cases: Sequence[tuple[Case, Path]],
    out: str | Path,
    device: DeviceChoice = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    floors: Sequence[str] = FLOORS,
    progress: Progress | None = None,
) -> TraceFile:
    """Records traces of cases (each with the folder of its pictures) on a full-precision checkpoint.

    Parameters and errors are those of `parity.record.record_cases`.
    """
    checkpoint = _opened(source)
    sampler = load_checkpoint(checkpoint, device, dtype)
    return record_cases(sampler, checkpoint.name, checkpoint.digest, cases, out, floors, progress)


def validate_artifact(
    path: str | Path,
    traces: Sequence[str | Path],
    source: str | Path | Checkpoint | None = None,
    device: DeviceChoice = "cpu",
    progress: Progress | None = None,
    networks: Networks = NO_NETWORKS,
) -> ParityReport:
    """Compares an artifact with traces of its source under its recipe's limits, and writes the reports.

    With `source`, the error is also attributed to components of the model. `networks` are LPIPS and CLIP, as far as the
    user has their weights. `device` may be a device map if there is no `source`.

    Raises TraceError on a trace of another source, RecipeError on a limit below the noise floor. A broken limit raises
    no error; it is in the report, whose method `require` raises GateError.
    """
    artifact = Artifact.open(path)
    recipe = artifact.manifest.recipe
    limits = resolve(recipe.limits.level, recipe.limits.overrides)
    files = [TraceFile.open(trace) for trace in traces]
    for file in files:
        file.expect_source(artifact.manifest.source.digest, str(path))
    dtype = common_dtype(files)
    reference = None
    if source is not None:
        if isinstance(device, DeviceMap):
            raise TargetError("--source needs the artifact and the source on one device; name one, or leave it away.")
        checkpoint = _opened(source)
        for file in files:
            file.expect_source(checkpoint.digest, checkpoint.name)
        reference = load_checkpoint(checkpoint, device, dtype)
    sampler = load(artifact, device, None if dtype == torch.bfloat16 else dtype)
    codecs, rounding = codecs_by_module(artifact), rounding_by_layer(artifact)
    candidate = Candidate(
        sampler, recipe.name, artifact.digest, recipe.limits.level, limits, codecs, rounding,
        presets={str(name): preset for name, preset in recipe.fast.items()},
    )  # fmt: skip
    found = compare(candidate, files, reference, progress, networks)
    return write_reports(artifact, found)


class ReportedFolder(Protocol):
    """An artifact or an export: its reports are written into its folder and contain its digest."""

    @property
    def path(self) -> Path: ...
    @property
    def digest(self) -> str: ...


def write_reports(build: ReportedFolder, found: Comparison) -> ParityReport:
    """Writes the reports of a comparison. Returns the parity report as written, with the digests of its pictures."""
    folder, digests = build.path / REPORTS, {}
    for case, pictures in found.pictures.items():
        with atomic_path(folder / f"{case}.png") as partial:
            side_by_side(*pictures).save(partial, "PNG")
        digests[case] = blake3_file(folder / f"{case}.png")
    report = found.report.model_copy(update={"pictures": digests})
    report.save(build.path)
    write_pages(build.path, build.digest)
    return report


def codecs_by_module(artifact: Artifact) -> dict[str, Codec]:
    """Path of each linear module -> its codec, from the manifest."""
    known = {}
    for entry in artifact.manifest.units.values():
        for tensor in entry.tensors:
            if official_role(tensor).kind in ("linear", "head"):
                known[parameter_path(tensor).removesuffix(".weight")] = entry.codec
    return known


def rounding_by_layer(artifact: Artifact) -> list[LayerRounding]:
    """The effect of calibrated rounding on each layer and expert; empty for a build without it."""
    found: dict[tuple[int, str], list[Rounded]] = defaultdict(list)
    for entry in artifact.manifest.units.values():
        role = official_role(next(iter(entry.tensors)))
        if entry.rounded is not None and role.layer is not None:
            found[role.layer, role.expert].append(entry.rounded)
    return [
        LayerRounding(
            layer=layer,
            expert=expert,
            error=mean(r.error for r in rounded) ** 0.5,
            nearest=mean(r.nearest for r in rounded) ** 0.5,
            predictor=mean(r.predictor**2 for r in rounded) ** 0.5,
        )
        for (layer, expert), rounded in sorted(found.items())
    ]


def side_by_side(reference: Tensor, found: Tensor, *inputs: Tensor) -> Image.Image:
    """One picture of reference, artifact, DIFFERENCE_GAIN times their difference, and the inputs.

    `reference` and `found` are uint8 [H, W, 3]; inputs, uint8 [h, w, 3], are scaled to fit into H x W on white.
    """
    from PIL import Image, ImageOps

    difference = (reference.int() - found.int()).abs() * DIFFERENCE_GAIN
    joined = torch.cat([reference, found, difference.clamp(max=255).to(torch.uint8)], dim=1)
    height, width = reference.shape[:2]
    image = Image.new("RGB", ((3 + len(inputs)) * width, height))
    image.paste(Image.fromarray(joined.numpy()))
    for i, given in enumerate(inputs):
        fitted = ImageOps.pad(Image.fromarray(given.numpy()), (width, height), color="white")
        image.paste(fitted, ((3 + i) * width, 0))
    return image


def _opened(source: str | Path | Checkpoint) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else Checkpoint.open(source)
