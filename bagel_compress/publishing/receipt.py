"""Receipt: a small JSON file per published recipe and target, with the digests and the measured values.

It is written when the upload has been verified. Receipts lie in the source tree under exports/receipts/, are reviewed
like code, and supply the numbers of tables in the documentation. They contain no paths, account names or tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bagel_compress.build.artifact import Artifact
from bagel_compress.io.yaml_model import FrozenModel
from bagel_compress.parity.report_data import BudgetReport, Number, Timing, write_json
from bagel_compress.publishing.provenance import versions
from bagel_compress.publishing.publishable import label, recipe_digest_of, source_of, weights_bytes
from bagel_compress.publishing.release import Release
from bagel_compress.publishing.release_reports import runtime_of
from bagel_compress.publishing.upload import Uploaded
from bagel_compress.report.text import worst_rows


class Receipt(FrozenModel):
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
    peak_predicted: Number | None  # bytes, the worst phase; None for an export
    peak_measured: Number | None
    measured_on: str | None
    timed_on: str | None
    limit: Number | None
    timings: tuple[Timing, ...]
    parity: dict[str, Number]
    versions: dict[str, str]
    parity_on: str = ""  # of an export: the runtime that its parity was measured with
    not_run: tuple[str, ...] = ()  # of an export: what was never run, one sentence each

    @property
    def name(self) -> str:
        """File name: <recipe>--<target>.json."""
        return f"{self.recipe}--{self.target}.json"


def write_receipts(release: Release, uploaded: Uploaded, folder: Path) -> list[Path]:
    """Writes one receipt per budget report, or one for the export's target. Returns the paths; none for a draft."""
    if release.draft:
        return []
    budgets = release.reports.budgets if isinstance(release.publishable, Artifact) else (None,)
    receipts = [_receipt(release, uploaded, budget) for budget in budgets]
    return [write_json(receipt, folder / receipt.name) for receipt in receipts]


def _receipt(release: Release, uploaded: Uploaded, budget: BudgetReport | None) -> Receipt:
    publishable, parity = release.publishable, release.reports.parity
    source = source_of(publishable)
    on_export: dict[str, Any] = {} if isinstance(publishable, Artifact) else {
        "parity_on": runtime_of(parity) if parity else "", "not_run": release.reports.not_run,
    }  # fmt: skip
    return Receipt(
        recipe=label(publishable),
        recipe_digest=recipe_digest_of(publishable),
        source=source.name,
        source_revision=source.revision,
        source_digest=source.digest,
        artifact=publishable.digest,
        repo=uploaded.repo,
        commit=uploaded.commit,
        weights_bytes=weights_bytes(publishable),
        all_bytes=sum(entry.bytes for entry in release.files.values()),
        parity={row.metric: row.value for row in worst_rows(parity)} if parity else {},
        versions=versions(),
        **_on_target(release, budget),
        **on_export,
    )


def _on_target(release: Release, budget: BudgetReport | None) -> dict[str, Any]:
    """The fields that come from a budget report; for an export, which has none, only target and device are known."""
    if budget is None:
        assert not isinstance(release.publishable, Artifact)
        manifest = release.publishable.manifest
        unknown = dict.fromkeys(("peak_predicted", "peak_measured", "measured_on", "timed_on", "limit"))
        return {"target": manifest.target, "device": manifest.device, "timings": (), **unknown}
    return {
        "target": budget.target,
        "device": budget.device,
        "peak_predicted": budget.peak,
        "peak_measured": max((p.measured for p in budget.phases if p.measured is not None), default=None),
        "measured_on": budget.measured_on,
        "timed_on": budget.timed_on,
        "limit": budget.limit,
        "timings": budget.timings,
    }
