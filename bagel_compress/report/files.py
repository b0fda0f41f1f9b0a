"""The files that are rendered from the JSON reports. They contain no other data, so they can be rendered again.

report.html    reports/junit.xml (one test per limit)    reports/summary.md (for the page of a CI run)
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bagel_compress.build.sizes import SizeGroup
from bagel_compress.parity.report_data import REPORTS, BudgetReport, CaseParity, ParityReport
from bagel_compress.report.html import render
from bagel_compress.report.text import junit, markdown

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
) -> dict[str, str]:
    """Path under the build's folder -> text. `pictures`: the cases to show, whose pictures are stored in `folder`."""
    shown = {case.name: [_png(part) for part in picture_parts(folder, case)] for case in pictures}
    return {
        PAGE: render(report, shown, budgets, sizes),
        JUNIT: junit(report, budgets),
        SUMMARY: markdown(report, budgets),
    }


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
