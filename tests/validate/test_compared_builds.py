"""Any builds side by side: the numbers are those of their reports, and every picture is on the page."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from tiny_suite import CASES, PICTURES, TINY

from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import find_recipe
from bagel_compress.parity.report_data import ParityReport
from bagel_compress.parity.trace import TraceFile
from bagel_compress.report.html import _difference
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.validation.artifact import record_source

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """raw, nf4-nearest, and a trace of their source."""
    folder = tmp_path_factory.mktemp("compared")
    checkpoint = Checkpoint.open(TINY)
    for name in ("raw", "nf4-nearest"):
        compress(make_plan(checkpoint, Recipe.load(find_recipe(name))), checkpoint, folder / name)
    cases = [(case, PICTURES) for case in CASES if case.name in ("t2i", "edit", "understand")]
    trace = record_source(checkpoint, cases, folder / "t.safetensors", floors=("repeat",))
    return folder / "raw", folder / "nf4-nearest", trace.path


def test_the_page_and_its_numbers_are_those_of_the_reports(
    builds: tuple[Path, Path, Path], cli: Cli, tmp_path: Path
) -> None:
    raw, nf4, trace = builds
    out = tmp_path / "page.html"
    code, shown, err = cli("compare", raw, nf4, "--trace", trace, "--out", out, "--json")
    assert code == 0, err
    first, second = json.loads(shown)["builds"]
    assert (first["psnr_db"], first["latent_path"]) == (None, 0.0)
    assert not first["passed"]  # equal, but the trace has no case that thinks
    drawn = [case for case in ParityReport.load(nf4).cases if case.has_image]
    assert second["latent_path"] == pytest.approx(np.median([case.metrics["latent.path"] for case in drawn]))
    page = out.read_text("utf-8")
    assert re.findall(r"<figcaption>([^:<]*)", page) == [  # t2i, then edit, which shows its input
        "reference", "raw", "nf4-nearest", "input", "reference", "raw", "nf4-nearest",
    ]  # fmt: skip
    pictures = [b64decode(data) for data in re.findall(r"src='data:image/png;base64,([^']+)'", page)]
    assert pictures[0] == pictures[1] != pictures[2]
    assert "Every picture is the reference's, byte for byte" in page.replace("&#x27;", "'")
    assert len(re.findall(r"<pre>", page)) == 3


def test_a_build_s_own_page_shows_what_an_edit_was_given(builds: tuple[Path, Path, Path], cli: Cli) -> None:
    _, nf4, trace = builds
    cli("validate", nf4, "--trace", trace)
    page = (nf4 / "report.html").read_text("utf-8")
    shown = re.findall(r"src='data:image/png;base64,([^']+)'></?(?:figcaption>)?([a-z]*)", page)
    assert [what for _, what in shown] == [
        "reference", "artifact", "difference", "input", "reference", "artifact", "difference",
    ]  # fmt: skip
    given = Image.open(io.BytesIO(b64decode(shown[3][0])))
    drawn = Image.open(io.BytesIO(b64decode(shown[4][0])))
    recorded = TraceFile.open(trace).read("edit").tensors["picture0"].numpy()
    expected = ImageOps.pad(Image.fromarray(recorded), drawn.size, color="white")
    assert np.array_equal(np.asarray(given.convert("RGB")), np.asarray(expected))


def test_what_cannot_be_compared(builds: tuple[Path, Path, Path], cli: Cli) -> None:
    raw, _, trace = builds
    assert "two or more builds" in cli("compare", raw, "--trace", trace)[2]


def test_the_difference_picture_is_bright_enough_to_see() -> None:
    """Its gain is stated on the page; a strong difference is not amplified."""
    rng = np.random.default_rng(0)

    def png(pixels: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
        return out.getvalue()

    base = rng.integers(60, 120, (32, 32, 3))
    for error, gain in ((1, 64), (5, 32), (100, 1), (0, 64)):
        picture, stated = _difference(png(base), png(base + error))
        assert stated == gain
        assert np.asarray(Image.open(io.BytesIO(picture))).max() == min(255, error * gain)
