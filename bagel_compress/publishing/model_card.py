"""The model card (README.md) of an artifact, made from its manifest and reports.

`card_sections` has the sections that it shares with the card of an export, `card_markdown` the escaping.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.loader_table import HEAD, loader_rows
from bagel_compress.build.sizes import SizeGroup
from bagel_compress.io.byte_size import size_text
from bagel_compress.parity.report_data import BudgetReport, number
from bagel_compress.publishing.card_markdown import code, gib, joined, plain, table
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
from bagel_compress.publishing.snippets import snippets
from bagel_compress.report.text import fitting, loss

if TYPE_CHECKING:
    from bagel_compress.publishing.release_reports import ReleaseReports

WIDTH_SHARE = 0.1  # share of the compressed weights that must have a width for the card to name it


def model_card(
    artifact: Artifact, reports: ReleaseReports, origin: Origin, draft: bool = False, signed: bool = False
) -> str:
    """The model card of an artifact, as Markdown. `signed`: whether the release has a signature."""
    m = artifact.manifest
    return joined(
        front_matter(_tags(artifact), reports, origin),
        _head(artifact, reports, origin, draft),
        pictures(reports),
        TABLE_START + "\n" + TABLE_END,
        _sizes(artifact),
        _budgets(reports.budgets),
        parity_section(reports.parity),
        presets_section(m.recipe, reports.parity),
        benchmark_section(reports.evaluations),
        loading(snippets(artifact, origin.repo)),
        _loaders(artifact),
        _losses(artifact, reports),
        recipe_section(m.recipe),
        provenance_section(
            m.source, {"recipe": m.recipe_digest, "plan": m.plan, "manifest": artifact.digest}, m.tool, origin, signed
        ),
        licence(origin),
    )


def _tags(artifact: Artifact) -> list[str]:
    """Tags for the Hub: formats, and the bit widths (4-bit, 8-bit) that at least WIDTH_SHARE of the compressed weights
    have, so that a head in INT8 does not make a 4-bit build an 8-bit one too."""
    coded = [u for u in artifact.manifest.units.values() if not u.codec.stored_as_is]
    formats = sorted({u.codec.format for u in coded})
    weights: Counter[str] = Counter()
    for unit in coded:
        weights[unit.codec.tag if not unit.codec.lossless else ""] += sum(
            math.prod(t.shape) for t in unit.tensors.values()
        )
    bits = sorted(tag for tag, count in weights.items() if tag and count >= WIDTH_SHARE * weights.total())
    lossless = all(u.snr_db is None for u in artifact.manifest.units.values())
    last = ["lossless-compression"] if lossless and formats else []
    return [*formats, *bits, *last]


def _head(artifact: Artifact, reports: ReleaseReports, origin: Origin, draft: bool) -> str:
    """The title and the summary: size, targets that it fits, loss, verdict; then the recipe's own summary."""
    manifest = artifact.manifest
    stored, source = totals(artifact)
    bits = 8 * stored / sum(g.parameters for g in artifact.groups())
    lines = titled(origin, draft)
    lines.append(
        f"{base_link(origin, manifest.source)} compressed to **{size_text(stored)}** ({bits:.2f} bits per weight,"
        f" {stored / source:.0%} of"
        f" {size_text(source)} in bf16) by [bagel-compress](https://pypi.org/project/bagel-compress/),"
        f" recipe {code(manifest.recipe.name)}."
    )
    if fits := fitting(reports.budgets):
        lines.append(plain(fits))
    if reports.parity is not None and reports.was_run:
        parity = reports.parity
        verdict = (
            f"All {len(parity.rows)} limits of its class hold." if parity.passed else "It did **not** pass its limits."
        )
        lines.append(f"{plain(loss(parity))} {verdict}".strip())
    lines += [plain(text) for text in (manifest.recipe.summary, manifest.recipe.card) if text]
    return "\n\n".join(lines)


def totals(artifact: Artifact) -> tuple[int, int]:
    """(bytes of all tensors as stored, their bytes in bf16)."""
    groups = artifact.groups()
    return sum(g.nbytes for g in groups), sum(g.source_bytes for g in groups)


def _sizes(artifact: Artifact) -> str:
    def row(g: SizeGroup) -> list[str]:
        return [g.component, g.expert, g.codec, f"{g.parameters:,}", size_text(g.source_bytes), size_text(g.nbytes),
                f"{g.bits:.3f}"]  # fmt: skip

    stored, source = totals(artifact)
    vae = artifact.vae_path.stat().st_size
    total = sum(entry.bytes for entry in artifact.manifest.files.values())
    head = ("component", "expert", "format", "weights", "bf16", "here", "bits")
    rows = [row(g) for g in artifact.groups()]
    rows.append(["**all**", "", "", "", size_text(source), f"**{size_text(stored)}**", ""])
    return (
        "## Size\n\n" + table(head, rows) + f"\n\nThe VAE ({size_text(vae)}) is stored unchanged."
        f" All files together: {total:,} bytes."
    )


def _budgets(budgets: Sequence[BudgetReport]) -> str:
    lines = ["## Memory and speed"]
    if not budgets:
        return lines[0] + "\n\nNot predicted and not measured for any GPU."
    head = ("target", "peak, predicted", "phase of the peak", "peak, measured", "usable memory", "fits")
    lines.append(table(head, [_peak(b) for b in budgets]))
    timed = [(b, t) for b in budgets for t in b.timings]
    if not timed:
        return "\n\n".join([*lines, "Speed was not measured."])
    rows = [
        [plain(t.what), f"{number(t.median)} s", f"{number(t.p90)} s", "-" if t.ratio is None else f"{t.ratio:.2f}x",
         plain(b.timed_on or "unknown")]
        for b, t in timed
    ]  # fmt: skip
    return "\n\n".join([*lines, table(("what", "median", "90 % below", "of the reference's", "measured on"), rows)])


def _peak(budget: BudgetReport) -> list[str]:
    """The row of a target, with its worst phase."""
    worst = max(budget.phases, key=lambda phase: phase.total)
    measured = max((p.measured for p in budget.phases if p.measured is not None), default=None)
    where = f" ({plain(budget.measured_on)})" if measured is not None and budget.measured_on else ""
    limit = "no limit" if budget.limit is None else gib(budget.limit)
    return [
        *(plain(budget.target), gib(worst.total), plain(worst.name), gib(measured) + where),
        *(limit, "**no**" if budget.broken else "yes"),
    ]


def _loaders(artifact: Artifact) -> str:
    rows = loader_rows(artifact)
    return "## Other loaders\n\n" + table(HEAD, rows) if rows else ""


def _losses(artifact: Artifact, reports: ReleaseReports) -> str:
    """The section on known losses, from the signal-to-noise ratio of every tensor and the report's attribution."""
    units, parity = artifact.manifest.units, reports.parity
    lossy = {name: u for name, u in units.items() if u.snr_db is not None}
    lines = ["## Limits and known losses"]
    if not lossy:
        lines.append("No weight was changed: every tensor decodes to exactly the bf16 values of the source.")
    else:
        by_format: dict[str, list[float]] = {}
        for unit in lossy.values():
            by_format.setdefault(unit.codec.format, []).append(float(unit.snr_db or 0.0))
        for name, values in sorted(by_format.items()):
            values.sort()
            lines.append(
                f"- {len(values)} matrices in {code(name)} carry rounding noise: signal-to-noise ratio"
                f" {values[0]:.1f} dB at worst, {values[len(values) // 2]:.1f} dB in the median."
            )
        lines.append(f"- The other {len(units) - len(lossy)} groups of weights are exact.")
        lines += [
            f"- {plain(w.group)}: {w.matrices} matrices have calibrated rounding, which minimises the error of a"
            f" layer's output. Its relative error is {number(w.error)} in the median and {number(w.worst)} at worst;"
            f" rounding each weight alone gives {number(w.nearest)}. Their signal-to-noise ratio is lower in exchange."
            for w in artifact.weighted_errors()
        ]
    explained = [(name, u) for name, u in units.items() if u.reason]
    lines += [f"- {plain(name)} is in {code(u.codec.format)}: {plain(u.reason)}" for name, u in explained]
    if parity is not None and parity.shares:
        largest = max(parity.shares, key=lambda s: s.velocity or 0.0)
        if largest.velocity:
            lines.append(
                f"- Most of the error of the velocities comes from {plain(largest.component)} (relative error"
                f" {number(largest.velocity)} when only that part is compressed)."
            )
    unmeasured = "" if reports.evaluations else " Scores such as GenEval were not measured."
    lines.append(
        "- Pictures made with another seed, size, step count or guidance than those measured may differ by more."
        + unmeasured
    )
    return lines[0] + "\n\n" + "\n".join(lines[1:])
