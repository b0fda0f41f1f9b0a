"""Release: a folder with exactly the files that are uploaded, and their verified digests.

It is made only from an artifact or export whose bytes match its manifest, and whose reports contain its digest and
pass. Everything that is missing is listed in one GateError. A draft may lack reports, but its bytes have to match; its
card says that it is a draft. An export that was never run in the form that is published needs `unrun` as well.

Large files are linked into the folder, not copied, if the file system allows it; the build itself is not changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest_files import intact_sha256
from bagel_compress.errors import GateError, PublishError
from bagel_compress.io.atomic import write_atomic
from bagel_compress.io.digests import sha256_file
from bagel_compress.publishing import provenance
from bagel_compress.publishing.card_sections import CARD, Origin
from bagel_compress.publishing.collection_table import ROW_FILE, collection_row
from bagel_compress.publishing.export_card import card_of
from bagel_compress.publishing.provenance import ListedFile
from bagel_compress.publishing.publishable import Publishable, label, manifest_name, source_of
from bagel_compress.publishing.release_reports import ReleaseReports, load_reports, runtime_of
from bagel_compress.report.files import page_files

Stamp = tuple[int, int]  # size in bytes, time of the last change in ns
MARK = ".release"  # suffix of a file beside the folder, which says that `publish` made the folder and may replace it


@dataclass(frozen=True)
class Release:
    """A folder that is ready to be uploaded. `files` has the digest that each file was verified with."""

    publishable: Publishable
    reports: ReleaseReports
    folder: Path
    files: Mapping[str, ListedFile]
    draft: bool

    @property
    def title(self) -> str:
        """The summary line of the commit."""
        return f"{'Draft of ' if self.draft else ''}{label(self.publishable)}, manifest {self.publishable.digest[:12]}"


def make_release(
    publishable: Publishable,
    folder: Path,
    origin: Origin,
    draft: bool = False,
    signing_key: Path | None = None,
    unrun: bool = False,
) -> Release:
    """Verifies a build and its reports and writes the release folder; a folder of an earlier release is replaced.

    Raises GateError listing every fault of the build and its reports, PublishError if `folder` holds something else.
    """
    sums: dict[str, str] = {}  # sha256 of each file, computed while the file is verified
    stamps = _stamps(publishable)
    reports, missing = _checked_reports(publishable, origin, draft, unrun, sums)
    if missing:
        raise GateError(f"{publishable.path} is not ready to be published: " + "; ".join(missing) + ".")
    _emptied(folder)
    files = _build_files(publishable, folder, sums, stamps)
    files |= _report_files(publishable, reports, folder)
    build = collection_row(publishable, reports, origin.repo, origin.base_model)
    files[ROW_FILE] = _written(folder, ROW_FILE, (build.model_dump_json(indent=1) + "\n").encode())
    statement = provenance.statement_bytes(publishable, files)
    files[provenance.PROVENANCE] = _written(folder, provenance.PROVENANCE, statement)
    files[provenance.SUMS] = _written(folder, provenance.SUMS, provenance.sums(files).encode())
    if signing_key is not None:
        files[provenance.SIGNATURE] = _entry(provenance.sign(folder, signing_key))
    signed = signing_key is not None
    card = card_of(publishable, reports, origin, draft, signed)
    files[CARD] = _written(folder, CARD, card.encode())
    return Release(publishable, reports, folder, dict(sorted(files.items())), draft)


def _checked_reports(
    publishable: Publishable, origin: Origin, draft: bool, unrun: bool, sums: dict[str, str]
) -> tuple[ReleaseReports, list[str]]:
    """The reports, and a phrase for every reason why the build may not be released. `sums` is filled by `verify`."""
    reports, faults = load_reports(publishable)
    damage = publishable.verify(sums)
    if draft:
        return reports, damage
    missing = damage + faults
    if not reports.was_run and not unrun and reports.parity is not None:
        missing.append(
            "it was never run in the form that is published (its parity was measured on its graphs with"
            f" {runtime_of(reports.parity)}); run `bagel-compress validate` on a machine with a GPU, or publish it"
            " with --unrun, which its model card will mention"
        )
    if origin.base_model is None:
        name = source_of(publishable).name
        missing.append(f"its source {name!r} is not a repository; name the repository it came from with --base-model")
    return reports, missing


def _emptied(folder: Path) -> None:
    """Makes the folder, or empties one of an earlier release. Raises PublishError if it holds something else."""
    mark = folder.with_name(folder.name + MARK)
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise PublishError(f"{folder} is not empty and was not made by publish; choose another folder with --folder.")
    write_atomic(mark, "made by bagel-compress publish; may be deleted\n")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def _stamps(publishable: Publishable) -> dict[str, Stamp]:
    """File of the manifest -> its size and time of modification; missing files are left out."""
    paths = {name: publishable.path / name for name in publishable.manifest.files}
    return {name: _stamp(path) for name, path in paths.items() if path.is_file()}


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _build_files(
    publishable: Publishable, folder: Path, sums: Mapping[str, str], stamps: Mapping[str, Stamp]
) -> dict[str, ListedFile]:
    """Puts the files of the manifest, and the manifest, into the folder. `sums` and `stamps` are of the verified files.

    A linked file only has to be unmodified since it was verified. A copy is read and verified again. Raises GateError
    if a file was changed meanwhile.
    """
    files = {}
    for name, entry in publishable.manifest.files.items():
        linked = _linked(publishable.path / name, folder / name)
        files[name] = ListedFile(bytes=entry.bytes, sha256=sums[name])
        same = _stamp(folder / name) == stamps[name] if linked else intact_sha256(folder / name, entry) == sums[name]
        if not same:
            raise GateError(
                f"{publishable.path / name} was changed while it was published; run the same command again."
            )
    own = manifest_name(publishable)
    data = (publishable.path / own).read_bytes()
    manifest = ListedFile(bytes=len(data), sha256=publishable.digest)
    if hashlib.sha256(data).hexdigest() != publishable.digest:
        raise GateError(f"{publishable.path / own} was changed while it was published; run the same command again.")
    write_atomic(folder / own, data)
    return {**files, own: manifest}


def _report_files(publishable: Publishable, reports: ReleaseReports, folder: Path) -> dict[str, ListedFile]:
    """Copies reports and pictures into the folder, and renders the pages there from the reports.

    They are copied, not linked, so that a later validation of the build does not change the release.
    """
    files = {}
    for name in reports.files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(publishable.path / name, target)
        files[name] = _entry(target)
    if reports.parity is not None:
        sizes = publishable.groups() if isinstance(publishable, Artifact) else ()
        shown = [case for case in reports.parity.cases if case.name in reports.pictures]
        pages = page_files(publishable.path, reports.parity, reports.budgets, shown, sizes, reports.evaluations)
        files |= {name: _written(folder, name, page.encode()) for name, page in pages.items()}
    return files


def _linked(source: Path, target: Path) -> bool:
    """Puts a file into the release folder. Returns True for a hard link, False for a copy, if links are impossible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # the folder is on another file system, or on one without hard links
        shutil.copyfile(source, target)
        return False
    return True


def _written(folder: Path, name: str, content: bytes) -> ListedFile:
    path = folder / name
    write_atomic(path, content)
    return ListedFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _entry(path: Path) -> ListedFile:
    return ListedFile(bytes=path.stat().st_size, sha256=sha256_file(path))
