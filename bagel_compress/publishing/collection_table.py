"""The comparison table of a Hub collection: the builds of one base model, on the card of each of them.

Every release contains `reports/build.json`, the few numbers by which builds are compared. The table is made from these
files of all members of the collection, never from cards, and is put between two markers on each member's card. Cards
are not covered by SHA256SUMS, so a build stays verifiable when its table changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.limits import Metric
from bagel_compress.errors import PublishError
from bagel_compress.io.byte_size import size_text
from bagel_compress.io.hub_client import failures, split_repo_id
from bagel_compress.io.yaml_model import FrozenModel
from bagel_compress.parity.report_data import Number, number
from bagel_compress.publishing.card_markdown import gib, plain, table
from bagel_compress.publishing.card_sections import CARD, TABLE_END, TABLE_START
from bagel_compress.publishing.publishable import Publishable, label, weights_bytes
from bagel_compress.publishing.release_reports import ReleaseReports
from bagel_compress.report.text import worst_rows

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ROW_FILE = "reports/build.json"
COMPARED = (Metric.LATENT_PATH, Metric.IMAGE_PSNR, Metric.LOGITS_KL_MEAN)  # columns on parity, if measured


class CollectionRow(FrozenModel, extra="ignore"):
    """The row of one build; the contents of its `reports/build.json`."""

    repo: str
    base_model: str
    recipe: str
    artifact: str
    formats: tuple[str, ...]
    weights_bytes: int
    peaks: dict[str, Number]  # target -> largest predicted peak of any task, bytes
    parity: dict[str, Number]


def collection_row(
    publishable: Publishable, reports: ReleaseReports, repo: str, base_model: str | None
) -> CollectionRow:
    """The row of a build that is about to be published to `repo`."""
    peaks = {b.target: b.peak for b in reports.budgets}
    values = {row.metric: row.value for row in worst_rows(reports.parity)} if reports.parity else {}
    return CollectionRow(
        repo=repo,
        base_model=base_model or "",
        recipe=label(publishable),
        artifact=publishable.digest,
        formats=_formats(publishable),
        weights_bytes=weights_bytes(publishable),
        peaks=peaks,
        parity={m: values[m] for m in COMPARED if m in values},
    )


def _formats(publishable: Publishable) -> tuple[str, ...]:
    if isinstance(publishable, Artifact):
        return tuple(sorted({g.codec for g in publishable.groups()}))
    settings = publishable.manifest.settings
    forms = {form for kind in publishable.kinds() for form in kind.forms}
    return (settings.runtime, settings.precision, *sorted(forms))


def add_to_collection(api: HfApi, title: str, own: CollectionRow) -> list[str]:
    """Adds a published build to its owner's collection and updates the table on every member's card.

    Returns the repositories whose cards changed. Raises PublishError if a member is a build of another base.
    """
    owner = own.repo.partition("/")[0]
    builds = [*other_members(api, title, own), own]
    with failures(f"collection {title!r} of {owner} cannot be written"):
        collection = api.create_collection(title, namespace=owner, exists_ok=True)
        api.add_collection_item(collection.slug, own.repo, "model", exists_ok=True)
    text = comparison(builds)
    return [b.repo for b in builds if b.repo.partition("/")[0] == owner and _update_card(api, b.repo, text)]


def other_members(api: HfApi, title: str, own: CollectionRow) -> list[CollectionRow]:
    """The rows of the collection's other builds. Raises PublishError if one of them is of another base."""
    owner = own.repo.partition("/")[0]
    with failures(f"collection {title!r} of {owner} cannot be written"):
        collection = api.create_collection(title, namespace=owner, exists_ok=True)
        repos = [i.item_id for i in api.get_collection(collection.slug).items if i.item_type == "model"]
    builds = [build for repo in repos if repo != own.repo and (build := _member_row(api, repo)) is not None]
    for build in builds:
        if build.base_model != own.base_model:
            raise PublishError(
                f"collection {title!r} holds {build.repo}, a build of {build.base_model or 'an unnamed base'};"
                f" this one is of {own.base_model}. Choose another collection."
            )
    return builds


def comparison(builds: Sequence[CollectionRow]) -> str:
    """The table as Markdown, the smallest build first."""
    builds = sorted(builds, key=lambda b: (b.weights_bytes, b.repo))
    targets = sorted({t for b in builds for t in b.peaks})
    metrics = [m for m in COMPARED if any(m in b.parity for b in builds)]
    head = ["build", "formats", "weights", *(f"peak on {plain(t)}" for t in targets), *metrics]
    rows = [
        [
            f"[{plain(b.repo.partition('/')[2])}](https://huggingface.co/{b.repo})",
            plain(", ".join(b.formats)),
            size_text(b.weights_bytes),
            *(gib(b.peaks[t]) if t in b.peaks else "-" for t in targets),
            *(number(b.parity[m]) if m in b.parity else "-" for m in metrics),
        ]
        for b in builds
    ]
    return "## Builds of this base\n\n" + table(head, rows)


def card_with_table(card: str, text: str) -> str:
    """The card with `text` between the markers. Raises PublishError if the card has no markers."""
    start, end = card.find(TABLE_START), card.find(TABLE_END)
    if start < 0 or end < start:
        raise PublishError(f"the card lacks the markers of the table ({TABLE_START} ... {TABLE_END}); put them back.")
    return card[: start + len(TABLE_START)] + "\n" + text + "\n" + card[end:]


def table_of(card: str) -> str:
    """The table between the markers of a card; empty if there is none."""
    return card.partition(TABLE_START)[2].partition(TABLE_END)[0].strip()


def _member_row(api: HfApi, repo: str) -> CollectionRow | None:
    """The row of a member of the collection; None if the repository was not published by bagel-compress."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    repo = split_repo_id(repo)[0]
    with failures(f"{repo} cannot be read"):
        try:
            text = Path(api.hf_hub_download(repo, ROW_FILE)).read_text(encoding="utf-8")
        except (EntryNotFoundError, RepositoryNotFoundError):
            return None
    try:
        return CollectionRow.model_validate_json(text).model_copy(update={"repo": repo})
    except ValidationError:
        raise PublishError(f"{ROW_FILE} of {repo} is not readable; publish that build again.") from None


def _update_card(api: HfApi, repo: str, text: str) -> bool:
    """Writes the table into a member's card. Returns False if the card has it already."""
    with failures(f"the card of {repo} cannot be written"):
        head = api.model_info(repo).sha
        old = Path(api.hf_hub_download(repo, CARD, revision=head)).read_text(encoding="utf-8")
        new = card_with_table(old, text)
        if new == old:
            return False
        api.upload_file(
            path_or_fileobj=new.encode(),
            path_in_repo=CARD,
            repo_id=repo,
            parent_commit=head,
            commit_message="Comparison of the builds of this base",
        )
    return True
