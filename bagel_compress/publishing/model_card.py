"""The model card: manifest and reports -> README.md, so that a page says what was measured and nothing else.

Every number comes from the manifest or from a report that carries the manifest's digest; what was not measured is
called so. Front matter is written by huggingface_hub's own ModelCardData, and whatever comes from outside (names of
sources, prompts, texts of recipes) is escaped on its way into Markdown, so that a hostile name stays a name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.limits import METRICS
from bagel_compress.build.loader_table import HEAD, loader_rows
from bagel_compress.build.manifest import SourceEntry
from bagel_compress.build.recipe import Recipe
from bagel_compress.build.sizes import SizeGroup
from bagel_compress.io.byte_size import size_text
from bagel_compress.io.hub_client import parse_repo_id
from bagel_compress.parity.report_data import BudgetReport, ParityReport, number
from bagel_compress.publishing.snippets import Snippet, snippets
from bagel_compress.report.text import fitting, loss, worst_rows

if TYPE_CHECKING:
    from bagel_compress.publishing.release_reports import ReleaseReports

CARD = "README.md"
WIDTH_SHARE = 0.1  # of the coded weights: what a build must have in a width to be called by it
FAMILY_START, FAMILY_END = "<!-- builds of this base -->", "<!-- end of builds -->"
UPSTREAM = "https://huggingface.co/ByteDance-Seed/BAGEL-7B-MoT"


@dataclass(frozen=True)
class Origin:
    """What only the publisher knows."""

    repo: str  # owner/name of the release
    base_model: str | None  # Hub id of the model that was compressed
    license: str = "apache-2.0"
    relation: str = "quantized"  # of the build to the base, in the words of the Hub

    @classmethod
    def of(cls, source: SourceEntry, repo: str, base_model: str | None, license: str = "apache-2.0") -> Origin:
        """Takes the base from the manifest where the source was a repository; with an adapter it is a fine-tune."""
        base = base_model or (source.name if parse_repo_id(source.name) else None)
        return cls(repo, base, license, "quantized" if source.adapter is None else "finetune")


def model_card(
    artifact: Artifact, reports: ReleaseReports, origin: Origin, draft: bool = False, signed: bool = False
) -> str:
    """The whole README.md."""
    m = artifact.manifest
    return joined(
        front_matter(_tags(artifact), reports, origin),
        _head(artifact, reports, origin, draft),
        pictures(reports),
        FAMILY_START + "\n" + FAMILY_END,
        _sizes(artifact),
        _budgets(reports.budgets),
        parity_section(reports.parity),
        loading(snippets(artifact, origin.repo)),
        _loaders(artifact),
        _losses(artifact, reports.parity),
        recipe_section(m.recipe),
        provenance_section(
            m.source, {"recipe": m.recipe_digest, "plan": m.plan, "manifest": artifact.digest}, m.tool, origin, signed
        ),
        licence(origin),
    )


def joined(*sections: str) -> str:
    """A page of its sections; empty ones are left out."""
    return "\n\n".join(section for section in sections if section) + "\n"


def plain(text: object) -> str:
    """Foreign text as one line of Markdown that shows exactly its characters, in a cell or on a line of its own."""
    line = re.sub(r"([\\`*_{}\[\]<>()#!|~$&:])", r"\\\1", _one_line(text))
    return re.sub(r"^([-+=]|\d+(?=[.)]))", lambda m: f"&#8203;{m[1]}", line)


def code(text: object) -> str:
    """Foreign text as inline code: no markup, no line break, no end of the code or of a table cell inside."""
    return f"`{_one_line(text).replace('`', chr(39)).replace('|', '/')}`"


def _one_line(text: object) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the cells are already Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _tags(artifact: Artifact) -> list[str]:
    """Formats, and the widths of a tenth of the coded weights at least: a head in INT8 makes no build an 8-bit one."""
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


def front_matter(tags: Sequence[str], reports: ReleaseReports, origin: Origin) -> str:
    """The YAML on top, as the Hub reads it."""
    from huggingface_hub import ModelCardData

    data: dict[str, Any] = {
        "license": origin.license,
        "library_name": "bagel-mot",
        "pipeline_tag": "any-to-any",
        "quantized_by": origin.repo.partition("/")[0],
        "tags": ["bagel", "BAGEL-7B-MoT", *tags, "bagel-compress"],
    }
    if origin.base_model is not None:
        data |= {"base_model": origin.base_model, "base_model_relation": origin.relation}
    if reports.parity is not None and reports.tried:  # figures of a stand-in are no results of the build
        data |= {"model_name": origin.repo.partition("/")[2], "eval_results": _results(reports.parity)}
    return f"---\n{ModelCardData(**data).to_yaml().strip()}\n---"


def _results(parity: ParityReport) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="any-to-any",
            dataset_type="bagel-compress-cases",
            dataset_name=f"{len(parity.cases)} cases against the bf16 reference",
            metric_type=row.metric,
            metric_name=METRICS[row.metric].label if row.metric in METRICS else row.metric,
            metric_value=float(row.value),
        )
        for row in worst_rows(parity)
        if math.isfinite(row.value)  # the Hub takes no infinity (the PSNR of equal pictures)
    ]


def _head(artifact: Artifact, reports: ReleaseReports, origin: Origin, draft: bool) -> str:
    """What it is: size, where it fits, what is lost, the verdict; then the recipe's own words."""
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
    if reports.parity is not None and reports.tried:
        parity = reports.parity
        held = (
            f"All {len(parity.rows)} limits of its class hold." if parity.passed else "It did **not** pass its limits."
        )
        lines.append(f"{plain(loss(parity))} {held}".strip())
    lines += [plain(text) for text in (manifest.recipe.summary, manifest.recipe.card) if text]
    return "\n\n".join(lines)


def titled(origin: Origin, draft: bool) -> list[str]:
    """The title, and what a draft says of itself."""
    lines = [f"# {plain(origin.repo.partition('/')[2])}"]
    if draft:
        lines.append("> **DRAFT.** Not released: reports are missing or did not pass. Do not use or cite this build.")
    return lines


def base_link(origin: Origin, source: SourceEntry) -> str:
    """What was compressed or exported, linked where it is on the Hub."""
    name = f"[{plain(origin.base_model)}](https://huggingface.co/{origin.base_model})"
    base = name if origin.base_model else plain(source.name)
    return base if source.adapter is None else f"{base} with the adapter {code(source.adapter.name)} merged into it,"


def totals(artifact: Artifact) -> tuple[int, int]:
    """Bytes of all tensors as stored, and in bf16."""
    groups = artifact.groups()
    return sum(g.nbytes for g in groups), sum(g.source_bytes for g in groups)


def pictures(reports: ReleaseReports) -> str:
    """The pictures of the parity report."""
    if not reports.pictures:
        return ""
    lines = [
        "## Pictures",
        f"From left to right: the bf16 reference, {'this build' if reports.tried else 'what was run in its place'},"
        " their difference (amplified), and what an edit was given; same prompt, same noise.",
    ]
    for name, path in reports.pictures.items():
        lines.append(f"**{plain(name)}** {plain(reports.prompt(name))}\n\n![{plain(name)}](./{path})")
    return "\n\n".join(lines)


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
        "## Size\n\n" + table(head, rows) + f"\n\nThe VAE ({size_text(vae)}) is stored beside it as it is."
        f" All files together: {total:,} bytes."
    )


def _budgets(budgets: Sequence[BudgetReport]) -> str:
    lines = ["## Memory and speed"]
    if not budgets:
        return lines[0] + "\n\nNot predicted and not measured for any card."
    head = ("target", "peak, predicted", "in", "peak, measured", "usable there", "fits")
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
    """The row of a target: its worst phase."""
    worst = max(budget.phases, key=lambda phase: phase.total)
    measured = max((p.measured for p in budget.phases if p.measured is not None), default=None)
    where = f" ({plain(budget.measured_on)})" if measured is not None and budget.measured_on else ""
    limit = "no limit" if budget.limit is None else gib(budget.limit)
    return [
        *(plain(budget.target), gib(worst.total), plain(worst.name), gib(measured) + where),
        *(limit, "**no**" if budget.broken else "yes"),
    ]


def gib(nbytes: float | None) -> str:
    """Bytes as GiB for a table, "not measured" where there is no number."""
    return "not measured" if nbytes is None else f"{nbytes / 2**30:.2f} GiB"


def parity_section(parity: ParityReport | None) -> str:
    """The worst value of each metric, beside floor and limit."""
    if parity is None:
        return "## Parity with the reference\n\nNot measured."
    rows = [
        [
            METRICS[r.metric].label if r.metric in METRICS else plain(r.metric),
            *(number(r.value), "-" if r.floor is None else number(r.floor), number(r.limit)),
            *(plain(r.case) or "all", "yes" if r.ok else "**no**"),
        ]
        for r in worst_rows(parity)
    ]
    where = ", ".join(f"{plain(k)} {plain(v)}" for k, v in parity.environment.items())
    return (
        "## Parity with the reference\n\n"
        f"{len(parity.cases)} cases against bf16 weights, class {code(parity.level)}; the worst value of each metric."
        " The floor is the reference against itself under another attention kernel or dtype.\n\n"
        + table(("metric", "value", "floor", "limit", "case", "holds"), rows)
        + f"\n\nMeasured with {where}."
        + "".join(f"\n\n{plain(note)}" for note in parity.notes)
    )


def loading(ways: Iterable[Snippet]) -> str:
    """How to open it."""
    lines = ["## Use it"]
    for snippet in ways:
        note = f"\n\n{snippet.note}" if snippet.note else ""
        lines.append(f"### {snippet.title}{note}\n\n```{snippet.language}\n{snippet.text.strip()}\n```")
    return "\n\n".join(lines)


def _loaders(artifact: Artifact) -> str:
    rows = loader_rows(artifact)
    return "## Other loaders\n\n" + table(HEAD, rows) if rows else ""


def _losses(artifact: Artifact, parity: ParityReport | None) -> str:
    """What is lost, in words, from the error of every tensor and the report's attribution."""
    units = artifact.manifest.units
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
                f" {values[0]:.1f} dB at worst, {values[len(values) // 2]:.1f} dB in the middle."
            )
        lines.append(f"- The other {len(units) - len(lossy)} groups of weights are exact.")
        lines += [
            f"- {plain(w.group)}: {w.matrices} matrices were rounded for the inputs that their layers get. The relative"
            f" error of such a layer's output is {number(w.error)} in the middle and {number(w.worst)} at worst, where"
            f" rounding each weight alone gives {number(w.nearest)}; their signal-to-noise ratio is lower for it."
            for w in artifact.weighted_errors()
        ]
    fallen = [(name, u) for name, u in units.items() if u.reason]
    lines += [f"- {plain(name)} is in {code(u.codec.format)}: {plain(u.reason)}" for name, u in fallen]
    if parity is not None and parity.shares:
        share = max(parity.shares, key=lambda s: s.velocity or 0.0)
        if share.velocity:
            lines.append(
                f"- Most of the error of a picture's path comes from {plain(share.component)} (relative error"
                f" {number(share.velocity)} when only that part is compressed)."
            )
    lines.append(
        "- Pictures made with another seed, size, step count or guidance than those measured may differ by more."
        " Scores such as GenEval were not measured."
    )
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def recipe_section(recipe: Recipe) -> str:
    """The recipe, word for word in meaning."""
    text = yaml.safe_dump(
        _stated(recipe.model_dump(mode="json", by_alias=True)),
        sort_keys=False,
        allow_unicode=False,
        width=100,
    ).strip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"## Recipe\n\n{fence}yaml\n{text}\n{fence}"


def _stated(value: Any) -> Any:
    """A dumped recipe without the fields that say nothing; it parses to the same recipe."""
    if isinstance(value, dict):
        return {k: _stated(v) for k, v in value.items() if v is not None and v != [] and v != ""}
    return [_stated(v) for v in value] if isinstance(value, list) else value


def provenance_section(source: SourceEntry, digests: Mapping[str, str], tool: str, origin: Origin, signed: bool) -> str:
    """Source, digests and how to check them."""
    rows = [
        ("source", code(source.name)),
        ("revision", code(source.revision or "a local folder, no revision")),
        ("blake3 of all source values", code(source.data_blake3 or "not taken: read while it was exported")),
        *_altering(source),
        *((what, code(digest)) for what, digest in digests.items()),
        ("built with", plain(tool)),
    ]
    sign = " --key publisher.pem" if signed else ""
    what = (
        "`manifest.json` has the digest of every tensor, of the source and as stored"
        if "plan" in digests
        else "`export.json` has the place of every weight and the digest of every file"
    )
    text = (
        f"`SHA256SUMS` covers every file but this page; {what}; `reports/provenance.json` is an in-toto statement.\n\n"
        f"```sh\nbagel-compress verify {origin.repo}{sign}\n```"
    )
    return "## Provenance\n\n" + table(("what", "value"), rows) + "\n\n" + text


def _altering(source: SourceEntry) -> list[tuple[str, str]]:
    """What else decided the weights: rows for an adapter and for a second checkpoint."""
    rows = []
    if (adapter := source.adapter) is not None:
        low, high = (number(scale) for scale in adapter.scales)
        strength = f"scale {low}" if low == high else f"scales {low} to {high}"
        rows.append(("adapter merged", f"{code(adapter.name)}, {strength}, blake3 {code(adapter.blake3)}"))
    if (base := source.base) is not None:
        taken = [f"{len(base.tensors)} tensors from {code(base.tensors[0])} on"] if base.tensors else []
        where = code(f"{base.name}@{base.revision}" if base.revision else base.name)
        rows.append(("taken from a base", f"{where}: {', '.join([*taken, *map(code, base.files)]) or 'nothing'}"))
    return rows


def licence(origin: Origin) -> str:
    """Licence and attribution."""
    only_stored = origin.relation == "quantized"
    stored = "This build changes how the weights are stored and nothing else; the" if only_stored else "The"
    return (
        f"## Licence and attribution\n\n{plain(origin.license)}, as the weights it was made from."
        f" [BAGEL-7B-MoT]({UPSTREAM}) is by ByteDance Seed (Apache-2.0) and builds on Qwen2.5-7B-Instruct, SigLIP and"
        f" the FLUX.1-schnell autoencoder (all Apache-2.0). {stored} authors of those models did not make or endorse"
        " it."
    )
