"""Compares several builds of one source with the same traces, and shows them on one page.

The reports of each build are written into its folder, as `validate` does.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median
from string import Template
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.limits import Metric
from bagel_compress.io.byte_size import size_text
from bagel_compress.parity.compare import Progress
from bagel_compress.parity.report_data import CaseParity, ParityReport, number
from bagel_compress.parity.trace import Trace, TraceFile
from bagel_compress.report.files import picture_parts
from bagel_compress.report.html import embedded
from bagel_compress.report.text import loss
from bagel_compress.validation.artifact import validate_artifact

if TYPE_CHECKING:
    from bagel_compress.run.device_map import DeviceChoice

SIDE = 256  # longest side of a picture on the page, in pixels


@dataclass(frozen=True, slots=True)
class ComparedBuild:
    """A build with its parity report."""

    name: str  # of its folder
    artifact: Artifact
    report: ParityReport

    def median(self, metric: Metric) -> float | None:
        """The median of a metric over the cases that have it; None if there is none."""
        values = [case.metrics[metric] for case in self.report.cases if metric in case.metrics]
        return median(values) if values else None

    def case(self, name: str) -> CaseParity:
        """The values of a case."""
        return next(case for case in self.report.cases if case.name == name)

    def to_json(self) -> dict[str, Any]:
        """The numbers of the page; an infinite PSNR (equal pictures) is null."""
        psnr = self.median(Metric.IMAGE_PSNR)
        return {
            "build": str(self.artifact.path),
            "digest": self.artifact.digest,
            "bytes": self.artifact.nbytes,
            "latent_path": self.median(Metric.LATENT_PATH),
            "logits_kl_mean": self.median(Metric.LOGITS_KL_MEAN),
            "psnr_db": None if psnr == math.inf else psnr,
            "passed": self.report.passed,
        }


def compare_builds(
    builds: Sequence[Path], traces: Sequence[str | Path], device: DeviceChoice = "cpu", progress: Progress | None = None
) -> list[ComparedBuild]:
    """Validates each build against the traces, in the given order. Raises TraceError on a build of another source."""
    for trace in traces:
        for build in builds:  # before hours of work
            TraceFile.open(trace).expect_source(Artifact.open(build).manifest.source.digest, str(build))
    return [
        ComparedBuild(
            build.resolve().name, Artifact.open(build), validate_artifact(build, traces, None, device, progress)
        )
        for build in builds
    ]


def page(builds: Sequence[ComparedBuild], traces: Sequence[str | Path]) -> str:
    """One self-contained HTML page: a sentence per build, a table of distances, then pictures and texts by case."""
    title = " and ".join([", ".join(b.name for b in builds[:-1]), builds[-1].name])
    cases = list(_cases(builds, traces))
    sections = [
        f"<h1>{escape(title)}</h1><p class='soft'>side by side, from the same noise, against"
        f" {escape(builds[0].report.source)} in {len(cases)} cases</p>",
        *(f"<p><b>{escape(b.name)}</b>: {size_text(b.artifact.nbytes)}. {escape(loss(b.report))}</p>" for b in builds),
        _table(builds),
        *(_case(builds, trace) for trace in cases),
    ]
    template = files("bagel_compress.report").joinpath("page.html.in").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body="\n".join(sections))


def _cases(builds: Sequence[ComparedBuild], traces: Sequence[str | Path]) -> Iterator[Trace]:
    names = {case.name for case in builds[0].report.cases}
    for path in traces:
        file = TraceFile.open(path)
        yield from (file.read(name) for name in file.header.cases if name in names)


def _table(builds: Sequence[ComparedBuild]) -> str:
    columns = (
        ("latent error", Metric.LATENT_PATH), ("logits KL", Metric.LOGITS_KL_MEAN), ("PSNR dB", Metric.IMAGE_PSNR),
        ("SSIM", Metric.IMAGE_SSIM),
    )  # fmt: skip
    shown = [(head, metric) for head, metric in columns if any(b.median(metric) is not None for b in builds)]
    rows = "".join(
        f"<tr><td>{escape(b.name)}<small>{escape(b.report.level)}</small></td>"
        f"<td class='n' data-is='size'>{size_text(b.artifact.nbytes)}</td>"
        + "".join(f"<td class='n' data-is='{head}'>{_number(b.median(metric))}</td>" for head, metric in shown)
        + f"<td class='{'ok' if b.report.passed else 'no'}'>{'passed' if b.report.passed else 'did not pass'}</td></tr>"
        for b in builds
    )
    heads = "".join(f"<th class='n'>{head}</th>" for head, _ in shown)
    return (
        "<h2>Numbers</h2><div class='scroll'><table class='rows'>"
        f"<tr><th>build</th><th class='n'>size</th>{heads}<th></th></tr>{rows}</table></div>"
        "<p class='soft'><small>Medians over the cases.</small></p>"
    )


def _case(builds: Sequence[ComparedBuild], trace: Trace) -> str:
    """The pictures of a case in a row, input and reference first, and its texts."""
    name = trace.case.name
    first = builds[0].case(name)
    head = f"<h3>{escape(name)} <small class='soft'>{escape(first.kind)}</small></h3>"
    head += f"<p class='soft'>{escape(first.prompt)}</p>"
    shown: list[tuple[str, Image.Image]] = []
    if first.has_image:
        inputs = sorted(key for key in trace.tensors if key.startswith("picture"))
        shown += [("input", _image(trace.tensors[key])) for key in inputs]
        shown.append(("reference", _image(trace.tensors["image"])))
        for build in builds:
            psnr = _number(build.case(name).metrics[Metric.IMAGE_PSNR])
            label = f"{build.name}: {psnr}" + (" dB" if psnr != "equal" else "")
            shown.append((label, picture_parts(build.artifact.path, build.case(name))[1]))
    figures = "".join(
        f"<figure><img alt='{escape(label)}' src='{embedded(_png(image))}'>"
        f"<figcaption>{escape(label)}</figcaption></figure>"
        for label, image in shown
    )
    texts = [("reference", first.text.reference)] if first.text is not None else []
    texts += [(b.name, text.found) for b in builds if (text := b.case(name).text) is not None]
    columns = "".join(
        f"<div><small class='soft'>{escape(who)}</small><pre>{escape(text)}</pre></div>" for who, text in texts
    )
    row = f"<div class='scroll'><div class='row'>{figures}</div></div>" if figures else ""
    return f"<div class='case'>{head}{row}<div class='two'>{columns}</div></div>"


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _image(pixels_HWC: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels_HWC.numpy())


def _png(image: Image.Image) -> bytes:
    """The picture as PNG, reduced to SIDE pixels if it is larger."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()
