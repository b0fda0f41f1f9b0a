"""Receipt: what was published and what was measured for it, one small JSON per recipe and target.

It is written after the files were seen to have arrived, lies in the source tree under exports/receipts/, is reviewed
like code, and is where tables in the documentation take their numbers from. No paths, no account, no token.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from bagel_compress.card import totals
from bagel_compress.provenance import versions
from bagel_compress.publish.release import Release
from bagel_compress.publish.upload import Uploaded
from bagel_compress.report_text import worst_rows
from bagel_compress.reports import BudgetReport, Number, Timing, write_json


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Receipt(_Frozen):
    """A published build on one target."""

    recipe: str
    recipe_digest: str
    target: str
    device: str
    source: str
    source_revision: str
    source_digest: str
    artifact: str  # sha256 of the manifest
    repo: str
    commit: str
    weights_bytes: int
    all_bytes: int
    peak_predicted: Number  # bytes, the worst phase
    peak_measured: Number | None
    measured_on: str | None
    timed_on: str | None
    limit: Number | None
    timings: tuple[Timing, ...]
    parity: dict[str, Number]
    versions: dict[str, str]

    @property
    def name(self) -> str:
        """File name: <recipe>--<target>.json."""
        return f"{self.recipe}--{self.target}.json"


def write_receipts(release: Release, uploaded: Uploaded, folder: Path) -> list[Path]:
    """One receipt per target of the budget reports. A draft gets none."""
    if release.draft:
        return []
    receipts = [_receipt(release, uploaded, budget) for budget in release.evidence.budgets]
    return [write_json(receipt, folder / receipt.name) for receipt in receipts]


def _receipt(release: Release, uploaded: Uploaded, budget: BudgetReport) -> Receipt:
    manifest, parity = release.artifact.manifest, release.evidence.parity
    return Receipt(
        recipe=manifest.recipe.name,
        recipe_digest=manifest.recipe_digest,
        target=budget.target,
        device=budget.device,
        source=manifest.source.name,
        source_revision=manifest.source.revision,
        source_digest=manifest.source.digest,
        artifact=release.artifact.digest,
        repo=uploaded.repo,
        commit=uploaded.commit,
        weights_bytes=totals(release.artifact)[0],
        all_bytes=sum(entry.bytes for entry in release.files.values()),
        peak_predicted=budget.peak,
        peak_measured=max((p.measured for p in budget.phases if p.measured is not None), default=None),
        measured_on=budget.measured_on,
        timed_on=budget.timed_on,
        limit=budget.limit,
        timings=budget.timings,
        parity={row.metric: row.value for row in worst_rows(parity)} if parity else {},
        versions=versions(),
    )
