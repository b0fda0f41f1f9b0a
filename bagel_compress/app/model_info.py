"""What the page says about a model: recipe, formats, bytes, peak memory, the verdict of its gate."""

from __future__ import annotations

from collections.abc import Iterator

from bagel_compress.app.session import OpenModel
from bagel_compress.app.texts import Texts
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import EXPORT_MANIFEST, MANIFEST
from bagel_compress.errors import ArtifactError
from bagel_compress.io.byte_size import size_text
from bagel_compress.parity.report_data import ParityReport, load_budgets
from bagel_compress.run.target import GIB


def model_table(model: OpenModel, t: Texts) -> str:
    """A Markdown table."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(model, t))
    return f"| {t('model_name')} | **{model.name}** |\n|---|---|\n{rows}"


def _rows(model: OpenModel, t: Texts) -> Iterator[tuple[str, str]]:
    if (model.folder / MANIFEST).is_file():
        yield from _of_artifact(model, t)
    else:
        nbytes = sum(file.stat().st_size for file in model.folder.rglob("*") if file.is_file())
        yield t("format"), "ONNX" if (model.folder / EXPORT_MANIFEST).is_file() else f"bf16, {t('full')}"
        yield t("bytes"), size_text(nbytes)
    yield t("place"), model.place
    width, height = model.sizes["1:1"]
    yield t("sides"), f"{width} x {height}"


def _of_artifact(model: OpenModel, t: Texts) -> Iterator[tuple[str, str]]:
    artifact = Artifact.open(model.folder)
    yield t("recipe"), artifact.manifest.recipe.name
    formats = sorted({entry.codec.format for entry in artifact.manifest.units.values()})
    yield t("format"), ", ".join(formats)
    yield t("bytes"), size_text(artifact.nbytes)
    try:
        budgets = load_budgets(model.folder, artifact.digest)
    except ArtifactError:
        budgets = []
    known = [t("peak_of", f"{report.peak / GIB:.2f}", report.target) for report in budgets]
    yield t("peak"), ", ".join(known) or t("unknown", t("command_budget"))
    try:
        report = ParityReport.load(model.folder, artifact.digest)
        yield t("verdict"), t("passed") if report.passed else t("broken", len(report.broken) + len(report.faults))
    except ArtifactError:
        yield t("verdict"), t("not_validated")
