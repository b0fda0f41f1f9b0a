"""Release: exactly which files go to a repository, in a folder of its own, with the digests they were verified with.

It is built only from an artifact or export whose every byte is what its manifest says, and whose reports carry its
digest and pass. What is missing is listed, all of it, in one GateError. A draft may lack reports; it may not lack
integrity, and its card says what it is. An export whose own form was never run needs `unrun` as well.

Large files are linked into the folder, not copied, where the file system allows; nothing of the build is changed.
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
from bagel_compress.publishing.collection_table import BUILD, build_of
from bagel_compress.publishing.export_card import card_of
from bagel_compress.publishing.model_card import CARD, Origin
from bagel_compress.publishing.provenance import ListedFile
from bagel_compress.publishing.publishable import Publishable, label, manifest_name, source_of
from bagel_compress.publishing.release_reports import ReleaseReports, load_reports, ran
from bagel_compress.report.files import page_files

Stamp = tuple[int, int]  # size in bytes, time of the last change in ns
MARK = ".release"  # beside the folder: says that it was made here and may be made again


@dataclass(frozen=True)
class Release:
    """A folder that is ready to be uploaded. `files` has the digest of each file as it was verified."""

    publishable: Publishable
    reports: ReleaseReports
    folder: Path
    files: Mapping[str, ListedFile]
    draft: bool

    @property
    def title(self) -> str:
        """Summary line of the commit."""
        return f"{'Draft of ' if self.draft else ''}{label(self.publishable)}, manifest {self.publishable.digest[:12]}"


def make_release(
    publishable: Publishable,
    folder: Path,
    origin: Origin,
    draft: bool = False,
    signing_key: Path | None = None,
    unrun: bool = False,
) -> Release:
    """Verifies, judges and writes the release folder; an older one of ours is replaced.

    Raises GateError listing every fault of the build and of its reports, PublishError if `folder` is not ours.
    """
    sums: dict[str, str] = {}  # sha256 of each file, taken while it is verified: no byte is read for it again
    stamps = _stamps(publishable)
    reports, missing = _judged(publishable, origin, draft, unrun, sums)
    if missing:
        raise GateError(f"{publishable.path} is not ready to be published: " + "; ".join(missing) + ".")
    _fresh(folder)
    files = _build_files(publishable, folder, sums, stamps)
    files |= _report_files(publishable, reports, folder)
    build = build_of(publishable, reports, origin.repo, origin.base_model)
    files[BUILD] = _written(folder, BUILD, (build.model_dump_json(indent=1) + "\n").encode())
    statement = provenance.statement_bytes(publishable, files)
    files[provenance.PROVENANCE] = _written(folder, provenance.PROVENANCE, statement)
    files[provenance.SUMS] = _written(folder, provenance.SUMS, provenance.sums(files).encode())
    if signing_key is not None:
        files[provenance.SIGNATURE] = _entry(provenance.sign(folder, signing_key))
    signed = signing_key is not None
    card = card_of(publishable, reports, origin, draft, signed)
    files[CARD] = _written(folder, CARD, card.encode())
    return Release(publishable, reports, folder, dict(sorted(files.items())), draft)


def _judged(
    publishable: Publishable, origin: Origin, draft: bool, unrun: bool, sums: dict[str, str]
) -> tuple[ReleaseReports, list[str]]:
    """The reports, and everything that keeps the build from being released; `sums` is filled as by `verify`."""
    reports, faults = load_reports(publishable)
    damage = publishable.verify(sums)
    if draft:
        return reports, damage
    missing = damage + faults
    if not reports.tried and not unrun and reports.parity is not None:
        missing.append(
            f"what it holds was never run (parity is that of its graphs by {ran(reports.parity)}); run `bagel-compress"
            " validate` where there is a card, or say --unrun, and the page will say so"
        )
    if origin.base_model is None:
        name = source_of(publishable).name
        missing.append(f"its source {name!r} is no repository; name the one it came from with --base-model")
    return reports, missing


def _fresh(folder: Path) -> None:
    """Empties a folder that an earlier release made; refuses one that something else made."""
    mark = folder.with_name(folder.name + MARK)
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise PublishError(f"{folder} is not empty and was not made by publish; choose another folder with --folder.")
    write_atomic(mark, "made by bagel-compress publish; may be deleted\n")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def _stamps(publishable: Publishable) -> dict[str, Stamp]:
    """Size and time of the last change of each file of the manifest that is there."""
    paths = {name: publishable.path / name for name in publishable.manifest.files}
    return {name: _stamp(path) for name, path in paths.items() if path.is_file()}


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _build_files(
    publishable: Publishable, folder: Path, sums: Mapping[str, str], stamps: Mapping[str, Stamp]
) -> dict[str, ListedFile]:
    """The files of the manifest, and the manifest itself. `sums` and `stamps` are those of the verified files.

    A linked file is the one that was verified if nobody wrote to it since. A copy is read: it was not verified itself.
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
    """Reports and pictures, copied so that a later validation does not change the release, and the pages on them.

    Pages are drawn here: they show what the reports say and nothing else.
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
        pages = page_files(publishable.path, reports.parity, reports.budgets, shown, sizes)
        files |= {name: _written(folder, name, page.encode()) for name, page in pages.items()}
    return files


def _linked(source: Path, target: Path) -> bool:
    """Puts a file into the release folder: a hard link, or a copy (False) where there are no links between the two."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        return False
    return True


def _written(folder: Path, name: str, content: bytes) -> ListedFile:
    path = folder / name
    write_atomic(path, content)
    return ListedFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _entry(path: Path) -> ListedFile:
    return ListedFile(bytes=path.stat().st_size, sha256=sha256_file(path))
