"""Sections that the model cards of artifacts and of exports share.

Every number comes from the manifest or from a report that carries the manifest's digest; what was not measured is
called so. huggingface_hub's own ModelCardData writes the front matter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from bagel_compress.build.limits import METRICS, Metric
from bagel_compress.build.manifest import SourceEntry
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.hub_client import parse_repo_id
from bagel_compress.parity.report_data import PRESET, ParityReport, number
from bagel_compress.publishing.card_markdown import code, plain, table
from bagel_compress.publishing.snippets import Snippet
from bagel_compress.report.benchmarks import HEAD, measured, shown
from bagel_compress.report.text import worst_rows

if TYPE_CHECKING:
    from bagel_compress.publishing.release_reports import ReleaseReports
    from bagel_compress.scores.evaluation_report import EvaluationReport

CARD = "README.md"
TABLE_START, TABLE_END = "<!-- builds of this base -->", "<!-- end of builds -->"  # around a collection's table
UPSTREAM = "https://huggingface.co/ByteDance-Seed/BAGEL-7B-MoT"


@dataclass(frozen=True)
class Origin:
    """Facts for the card that only the publisher knows."""

    repo: str  # owner/name of the repository to publish to
    base_model: str | None  # Hub id of the model that was compressed
    license: str = "apache-2.0"
    relation: str = "quantized"  # base_model_relation of the Hub: "quantized" or "finetune"

    @classmethod
    def of(cls, source: SourceEntry, repo: str, base_model: str | None, license: str = "apache-2.0") -> Origin:
        """The origin of a build from `source`, whose repository, if it has one, is the default of `base_model`.

        A build with a merged adapter is a fine-tune of the base, any other is quantised from it.
        """
        base = base_model or (source.name if parse_repo_id(source.name) else None)
        return cls(repo, base, license, "quantized" if source.adapter is None else "finetune")


def front_matter(tags: Sequence[str], reports: ReleaseReports, origin: Origin) -> str:
    """The YAML at the top of the card, which the Hub reads."""
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
    if reports.parity is not None and reports.was_run:  # else the values were measured on another form of the build
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
        if math.isfinite(row.value)  # the Hub accepts no infinity (the PSNR of equal pictures)
    ]


def titled(origin: Origin, draft: bool) -> list[str]:
    """The title, and for a draft a warning."""
    lines = [f"# {plain(origin.repo.partition('/')[2])}"]
    if draft:
        lines.append("> **DRAFT.** Not released: reports are missing or did not pass. Do not use or cite this build.")
    return lines


def base_link(origin: Origin, source: SourceEntry) -> str:
    """The name of the model that was compressed or exported, with a link if it is on the Hub."""
    name = f"[{plain(origin.base_model)}](https://huggingface.co/{origin.base_model})"
    base = name if origin.base_model else plain(source.name)
    return base if source.adapter is None else f"{base} with the adapter {code(source.adapter.name)} merged into it,"


def pictures(reports: ReleaseReports) -> str:
    """The section with the pictures of the parity report; empty without pictures."""
    if not reports.pictures:
        return ""
    lines = [
        "## Pictures",
        f"From left to right: the bf16 reference, {'this build' if reports.was_run else 'what was run in its place'},"
        " their difference (amplified), and the input pictures of an edit; same prompt, same noise.",
    ]
    for name, path in reports.pictures.items():
        lines.append(f"**{plain(name)}** {plain(reports.prompt(name))}\n\n![{plain(name)}](./{path})")
    return "\n\n".join(lines)


def parity_section(parity: ParityReport | None) -> str:
    """The section on parity: the worst value of each metric with its noise floor and limit."""
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


def presets_section(recipe: Recipe | None, parity: ParityReport | None) -> str:
    """The sampler presets that the recipe promises, with their errors as validated."""
    if recipe is None or not recipe.fast:
        return ""

    def worst(preset: str, metric: Metric, choose: Callable[[Iterable[float]], float]) -> str:
        rows = [r for r in parity.rows if r.case.endswith(f"{PRESET}{preset}") and r.metric == metric] if parity else []
        return f"{number(choose(r.value for r in rows))} ({number(rows[0].limit)})" if rows else "not measured"

    rows = [
        [code(name), plain(preset), worst(name, Metric.LATENT_PATH, max), worst(name, Metric.IMAGE_PSNR, min)]
        for name, preset in recipe.fast.items()
    ]
    return (
        "## Presets of the sampler\n\n"
        "Fewer evaluations of the network, by `bagel-compress generate --preset NAME`; errors with the build's own"
        " included, from the reference with all steps.\n\n"
        + table(("preset", "settings", "worst error of the latent (limit)", "PSNR in dB (limit)"), rows)
    )


def benchmark_section(evaluations: Sequence[EvaluationReport]) -> str:
    """Published benchmarks that were run on this build: the main figures, by whom and on what they were measured."""
    if not evaluations:
        return ""
    rows = [
        [plain(s.benchmark), plain(s.score), s.value, s.official or "-", s.difference or "-"]
        for report in evaluations
        for s in shown(report)
    ]
    notes = "\n".join(f"- {plain(measured(report))}" for report in evaluations)
    return "\n\n".join(["## Benchmarks", *([table(HEAD, rows)] if rows else []), notes])


def loading(snippets: Iterable[Snippet]) -> str:
    """The section with code that opens the build."""
    lines = ["## Use it"]
    for snippet in snippets:
        note = f"\n\n{snippet.note}" if snippet.note else ""
        lines.append(f"### {snippet.title}{note}\n\n```{snippet.language}\n{snippet.text.strip()}\n```")
    return "\n\n".join(lines)


def recipe_section(recipe: Recipe) -> str:
    """The section with the recipe as YAML, which parses to the same recipe."""
    text = yaml.safe_dump(
        _without_empty(recipe.model_dump(mode="json", by_alias=True)),
        sort_keys=False,
        allow_unicode=False,
        width=100,
    ).strip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"## Recipe\n\n{fence}yaml\n{text}\n{fence}"


def _without_empty(value: Any) -> Any:
    """The dump of a recipe without empty fields; it parses to the same recipe."""
    if isinstance(value, dict):
        return {k: _without_empty(v) for k, v in value.items() if v is not None and v != [] and v != ""}
    return [_without_empty(v) for v in value] if isinstance(value, list) else value


def provenance_section(source: SourceEntry, digests: Mapping[str, str], tool: str, origin: Origin, signed: bool) -> str:
    """The section on provenance: source, `digests` by name, and how to verify them."""
    rows = [
        ("source", code(source.name)),
        ("revision", code(source.revision or "a local folder, no revision")),
        ("blake3 of all source values", code(source.data_blake3 or "not taken: read while it was exported")),
        *_further_sources(source),
        *((what, code(digest)) for what, digest in digests.items()),
        ("built with", plain(tool)),
    ]
    sign = " --key publisher.pem" if signed else ""
    contents = (
        "`manifest.json` has the digest of every tensor, of the source and as stored"
        if "plan" in digests
        else "`export.json` has the place of every weight and the digest of every file"
    )
    text = (
        f"`SHA256SUMS` covers every file but this page; {contents}; `reports/provenance.json` is an in-toto statement."
        f"\n\n```sh\nbagel-compress verify {origin.repo}{sign}\n```"
    )
    return "## Provenance\n\n" + table(("what", "value"), rows) + "\n\n" + text


def _further_sources(source: SourceEntry) -> list[tuple[str, str]]:
    """Rows for what the weights come from besides the source: a merged adapter, a second checkpoint."""
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
    """The section on licence and attribution."""
    quantized = origin.relation == "quantized"
    subject = "This build changes how the weights are stored and nothing else; the" if quantized else "The"
    return (
        f"## Licence and attribution\n\n{plain(origin.license)}, as the weights it was made from."
        f" [BAGEL-7B-MoT]({UPSTREAM}) is by ByteDance Seed (Apache-2.0) and builds on Qwen2.5-7B-Instruct, SigLIP and"
        f" the FLUX.1-schnell autoencoder (all Apache-2.0). {subject} authors of those models did not make or endorse"
        " it."
    )
