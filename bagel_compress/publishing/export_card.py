"""The model card (README.md) of an export: its blocks, what was checked, and what was not.

If the graphs or engines were never run in the form that is published, the first lines say so.
"""

from __future__ import annotations

from bagel_compress.build.artifact import Artifact
from bagel_compress.codecs.traits import ONNX_FORMS
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.io.byte_size import size_text
from bagel_compress.publishing.card_markdown import code, joined, plain, table
from bagel_compress.publishing.card_sections import (
    TABLE_END,
    TABLE_START,
    Origin,
    base_link,
    benchmark_section,
    front_matter,
    licence,
    loading,
    parity_section,
    pictures,
    presets_section,
    provenance_section,
    recipe_section,
    titled,
)
from bagel_compress.publishing.model_card import model_card
from bagel_compress.publishing.publishable import Publishable, recipe_digest_of, source_of
from bagel_compress.publishing.release_reports import ReleaseReports, runtime_of
from bagel_compress.publishing.snippets import export_snippets


def card_of(
    publishable: Publishable, reports: ReleaseReports, origin: Origin, draft: bool = False, signed: bool = False
) -> str:
    """The model card of an artifact or an export, as Markdown. `signed`: whether the release has a signature."""
    if isinstance(publishable, Artifact):
        return model_card(publishable, reports, origin, draft, signed)
    m = publishable.manifest
    digests = {f"{m.source.kind} that was exported": m.source.digest, "manifest": publishable.digest}
    if m.source.recipe is not None:
        digests = {"recipe": recipe_digest_of(publishable)} | digests
    return joined(
        front_matter(_tags(publishable), reports, origin),
        _head(publishable, reports, origin, draft),
        _checked(publishable, reports),
        pictures(reports),
        TABLE_START + "\n" + TABLE_END,
        _blocks(publishable),
        parity_section(reports.parity),
        presets_section(m.source.recipe, reports.parity),
        benchmark_section(reports.evaluations),
        loading(export_snippets(publishable, origin.repo)),
        recipe_section(m.source.recipe) if m.source.recipe else "",
        provenance_section(source_of(publishable), digests, m.tool, origin, signed),
        licence(origin),
    )


def _tags(export: ExportFolder) -> list[str]:
    settings, recipe = export.manifest.settings, export.manifest.source.recipe
    codecs = [rule.codec for rule in recipe.rules if not rule.codec.stored_as_is] if recipe else []
    formats = sorted({codec.format for codec in codecs})
    bits = {codec.tag for codec in codecs if codec.tag and not codec.lossless}
    runtime = [settings.runtime] if settings.runtime == "onnxruntime" else ["tensorrt", settings.runtime]
    return ["onnx", *runtime, *formats, *sorted(bits)]


def _head(export: ExportFolder, reports: ReleaseReports, origin: Origin, draft: bool) -> str:
    manifest, settings = export.manifest, export.manifest.settings
    lines = titled(origin, draft)
    if not reports.was_run:
        lines.append(f"> **Built, not run.** {' '.join(reports.not_run)} You may be the first to run it.")
    what = "ONNX graphs" if settings.runtime == "onnxruntime" else "TensorRT engines, and the graphs behind them"
    recipe = f", recipe {code(manifest.source.recipe.name)}" if manifest.source.recipe else ""
    lines.append(
        f"{base_link(origin, source_of(export))} as {what}, one per block, for {plain(settings.runtime)} in"
        f" {settings.precision} (opset {manifest.opset}), **{size_text(export.nbytes)}**, by"
        f" [bagel-compress](https://pypi.org/project/bagel-compress/){recipe}, target {code(manifest.target)}."
        " The repository has everything that a sampler needs."
    )
    if manifest.source.recipe and manifest.source.recipe.card:
        lines.append(plain(manifest.source.recipe.card))
    return "\n\n".join(lines)


def _checked(export: ExportFolder, reports: ReleaseReports) -> str:
    settings, parity = export.manifest.settings, reports.parity
    rows = [("every graph passes onnx.checker with shape inference, by path", "yes")]
    if settings.runtime != "onnxruntime":
        capabilities = ", ".join(settings.capabilities) or "the GPU it was built on"
        rows.append((f"every engine was built by {plain(settings.runtime)}, for {plain(capabilities)}", "yes"))
    verdict = "no" if parity is None else "passed" if parity.passed else "**did not pass**"
    how = f", by {plain(runtime_of(parity))}" if parity else ""
    rows.append((f"the whole sampler was compared with the bf16 reference{how}", verdict))
    rows += [(plain(sentence), "**not run**") for sentence in reports.not_run]
    rows.append((f"memory and speed on {plain(export.manifest.device)}", "not measured"))
    made = ", ".join(f"{plain(name)} {plain(version)}" for name, version in export.manifest.versions.items())
    text = f"## What was checked, and what was not\n\n{table(('what', 'state'), rows)}\n\nMade with {made}."
    if settings.runtime != "onnxruntime":
        sizes = ", ".join(f"{plain(n)} {s.min} to {s.max}" for n, s in export.manifest.axes.items())
        text += f" Engines accept these sizes: {sizes}."
    return text


def _blocks(export: ExportFolder) -> str:
    first = {entry.kind: entry for entry in reversed(export.manifest.blocks.values())}
    rows = []
    for kind in export.kinds():
        entry = first[kind.kind]
        ports = (", ".join(code(p.name) for p in side) for side in (entry.inputs, entry.outputs))
        forms = ", ".join(ONNX_FORMS.get(form, form) for form in kind.forms) or "-"
        engines = size_text(kind.engines) if kind.engines else "-"
        rows.append((code(kind.kind), str(kind.blocks), *ports, forms, size_text(kind.reads), engines))
    return (
        "## Blocks\n\n"
        + table(("kind", "graphs", "inputs", "outputs", "matrices", "weights it reads", "engines"), rows)
        + "\n\n`und_layer` serves text and input pictures, `gen_layer` denoises. The two graphs of a layer read one"
        " data file, which holds every weight once."
    )
