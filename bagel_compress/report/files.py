"""The files that are rendered from the JSON reports. They contain no other data, so they can be rendered again.

Reports arrive one after the other: parity from `validate`, budgets from `budget`, benchmarks from `evaluate`. Each verb
renders the files again from all that are there, and `publish` does so in its own folder. All carry the build's digest.

report.html    reports/junit.xml (one test per limit)    reports/summary.md (for the page of a CI run)
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.build.sizes import SizeGroup
from bagel_compress.io.atomic import write_atomic
from bagel_compress.parity.report_data import PARITY, REPORTS, BudgetReport, CaseParity, ParityReport, load_budgets
from bagel_compress.report.html import render
from bagel_compress.report.text import junit, markdown
from bagel_compress.scores.evaluation_report import EvaluationReport, load_evaluations

if TYPE_CHECKING:
    from PIL import Image

PAGE, JUNIT, SUMMARY = "report.html", f"{REPORTS}/junit.xml", f"{REPORTS}/summary.md"


def picture_name(case: str) -> str:
    """Path of a case's picture under the build's folder: reference, build, difference and inputs side by side."""
    return f"{REPORTS}/{case}.png"


def page_files(
    folder: Path,
    report: ParityReport,
    budgets: Sequence[BudgetReport],
    pictures: Iterable[CaseParity],
    sizes: Sequence[SizeGroup] = (),
    evaluations: Sequence[EvaluationReport] = (),
) -> dict[str, str]:
    """Path under the build's folder -> text. `pictures`: the cases to show, whose pictures are stored in `folder`."""
    shown = {case.name: [_png(part) for part in picture_parts(folder, case)] for case in pictures}
    return {
        PAGE: render(report, shown, budgets, sizes, evaluations),
        JUNIT: junit(report, budgets),
        SUMMARY: markdown(report, budgets, evaluations),
    }


def write_pages(path: str | Path, digest: str | None = None) -> Path:
    """Renders report.html, junit.xml and summary.md from the JSON reports of a build. Returns the path of the first.

    Raises ArtifactError if there is no report, or if one does not belong to the build with this `digest`.
    """
    path = Path(path)
    report = ParityReport.load(path, digest)
    budgets, evaluations = load_budgets(path, digest), load_evaluations(path, digest)
    pictures = [case for case in report.cases if case.has_image]
    sizes = Artifact.open(path).groups() if (path / MANIFEST).is_file() else ()
    for name, content in page_files(path, report, budgets, pictures, sizes, evaluations).items():
        write_atomic(path / name, content)
    return path / PAGE


def write_pages_again(path: Path, digest: str) -> None:
    """After another report arrived: the files with it in them, where the build was validated before."""
    if (path / REPORTS / PARITY).is_file():
        write_pages(path, digest)


def picture_parts(folder: Path, case: CaseParity) -> list[Image.Image]:
    """Pictures of a case: reference, build, difference, inputs. Validation stored them side by side in one file."""
    from PIL import Image

    parts = 3 + case.input_pictures
    with Image.open(folder / picture_name(case.name)) as image:
        width = max(1, image.width // parts)
        return [image.crop((i * width, 0, (i + 1) * width, image.height)) for i in range(parts)]


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return data.getvalue()
