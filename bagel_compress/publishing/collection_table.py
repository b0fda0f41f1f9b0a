"""Family: the builds of one base on linked cards with one comparison table.

Every release carries `reports/build.json`, the few numbers by which builds are compared. A family is a collection on
the Hub; its table is made from those files, never from cards, and put between two markers of each member's card. Cards
are outside SHA256SUMS, so a member stays verifiable when its table grows.
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
from bagel_compress.publishing.model_card import CARD, FAMILY_END, FAMILY_START, gib, plain, table
from bagel_compress.publishing.publishable import Publishable, label, weights_bytes
from bagel_compress.publishing.release_reports import ReleaseReports
from bagel_compress.report.text import worst_rows

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BUILD = "reports/build.json"
COMPARED = (Metric.LATENT_PATH, Metric.IMAGE_PSNR, Metric.LOGITS_KL_MEAN)  # the columns of parity, where measured


class CollectionRow(FrozenModel, extra="ignore"):
    """What one member contributes to the table."""

    repo: str
    base_model: str
    recipe: str
    artifact: str
    formats: tuple[str, ...]
    weights_bytes: int
    peaks: dict[str, Number]  # target -> largest predicted peak of any task, bytes
    parity: dict[str, Number]


def build_of(publishable: Publishable, reports: ReleaseReports, repo: str, base_model: str | None) -> CollectionRow:
    """The row of a build."""
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


def join(api: HfApi, title: str, own: CollectionRow) -> list[str]:
    """Adds a published build to its owner's collection and renews the table on every member's card.

    Returns the repositories whose cards were written. Raises PublishError if a member belongs to another base.
    """
    owner = own.repo.partition("/")[0]
    builds = [*members(api, title, own), own]
    with failures(f"collection {title!r} of {owner} cannot be written"):
        collection = api.create_collection(title, namespace=owner, exists_ok=True)
        api.add_collection_item(collection.slug, own.repo, "model", exists_ok=True)
    text = comparison(builds)
    return [b.repo for b in builds if b.repo.partition("/")[0] == owner and _renew(api, b.repo, text)]


def members(api: HfApi, title: str, own: CollectionRow) -> list[CollectionRow]:
    """The other builds of the collection. Raises PublishError if one of them is of another base."""
    owner = own.repo.partition("/")[0]
    with failures(f"collection {title!r} of {owner} cannot be written"):
        collection = api.create_collection(title, namespace=owner, exists_ok=True)
        repos = [i.item_id for i in api.get_collection(collection.slug).items if i.item_type == "model"]
    builds = [build for repo in repos if repo != own.repo and (build := _build(api, repo)) is not None]
    for build in builds:
        if build.base_model != own.base_model:
            raise PublishError(
                f"collection {title!r} holds {build.repo}, a build of {build.base_model or 'an unnamed base'};"
                f" this one is of {own.base_model}. Choose another collection."
            )
    return builds


def comparison(builds: Sequence[CollectionRow]) -> str:
    """The table, smallest build first."""
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


def spliced(card: str, text: str) -> str:
    """The card with `text` between the markers. Raises PublishError if its owner removed them."""
    start, end = card.find(FAMILY_START), card.find(FAMILY_END)
    if start < 0 or end < start:
        raise PublishError(f"the card has no place for the table ({FAMILY_START} ... {FAMILY_END}); put it back.")
    return card[: start + len(FAMILY_START)] + "\n" + text + "\n" + card[end:]


def table_of(card: str) -> str:
    """What stands between the markers of a card, empty if nothing does."""
    return card.partition(FAMILY_START)[2].partition(FAMILY_END)[0].strip()


def _build(api: HfApi, repo: str) -> CollectionRow | None:
    """The numbers of a member; None if it is no release of ours."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    repo = split_repo_id(repo)[0]
    with failures(f"{repo} cannot be read"):
        try:
            text = Path(api.hf_hub_download(repo, BUILD)).read_text(encoding="utf-8")
        except (EntryNotFoundError, RepositoryNotFoundError):
            return None
    try:
        return CollectionRow.model_validate_json(text).model_copy(update={"repo": repo})
    except ValidationError:
        raise PublishError(f"{BUILD} of {repo} is not readable; publish that build again.") from None


def _renew(api: HfApi, repo: str, text: str) -> bool:
    """Writes the table into a member's card unless it is there already."""
    with failures(f"the card of {repo} cannot be written"):
        head = api.model_info(repo).sha
        old = Path(api.hf_hub_download(repo, CARD, revision=head)).read_text(encoding="utf-8")
        new = spliced(old, text)
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
