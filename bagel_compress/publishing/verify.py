"""Verifies that a folder or a repository has exactly the bytes that were released.

A folder is read in full. A repository is compared by the digests that the Hub lists, which it computed when the files
arrived, without downloading the weights; `full` downloads and reads everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bagel_compress.build.manifest import MANIFESTS, listed_files
from bagel_compress.errors import ArtifactError, GateError
from bagel_compress.io.digests import sha256_file
from bagel_compress.io.hub_client import client, download, split_repo_id
from bagel_compress.parity.report_data import REPORTS
from bagel_compress.publishing import provenance
from bagel_compress.publishing.publishable import Publishable, manifest_name, open_publishable
from bagel_compress.publishing.release_reports import load_reports
from bagel_compress.publishing.remote_files import Remote, read_remote
from bagel_compress.run.fetch import Files, fetch, manifest_in


@dataclass(frozen=True)
class Verdict:
    """The result of verifying a folder or repository."""

    where: str
    artifact: str  # sha256 of the manifest
    files: int
    how: str  # how the bytes were compared, as text
    signature: str  # "valid", "not valid", "not checked ..." or "none"
    faults: tuple[str, ...]  # one phrase each

    @property
    def text(self) -> str:
        """The verdict as text for a terminal."""
        about = f"artifact {self.artifact[:12]}; signature: {self.signature}"
        head = f"{self.where}: {self.files} files, {self.how}; {about}"
        return "\n".join([head, *(f"  {fault}" for fault in self.faults), "FAILED" if self.faults else "verified"])


def verify_folder(folder: Path, public_key: Path | None = None) -> Verdict:
    """Verifies a folder by reading every byte. Raises ArtifactError if it is neither an artifact nor an export."""
    publishable = open_publishable(folder)
    published = (folder / provenance.SUMS).is_file()
    if published:
        files, faults = len(provenance.sums_of(folder)), provenance.check_sums(folder)
        faults += _against_manifest(folder, publishable.manifest.files, manifest_name(publishable), publishable.digest)
        faults = faults or publishable.verify()  # checks the manifest's digests too, in case all others were forged
    else:
        files, faults = len(publishable.manifest.files) + 1, publishable.verify()
    faults += _stale_reports(publishable)
    signature = "none"
    if (folder / provenance.SIGNATURE).is_file() or public_key is not None:
        signature, fault = _signature(folder, public_key)
        faults += fault
    return Verdict(str(folder), publishable.digest, files, "every byte read", signature, tuple(faults))


def verify_repo(repo: str, revision: str | None = None, full: bool = False, public_key: Path | None = None) -> Verdict:
    """Verifies a repository. Raises HubError if it cannot be read, ArtifactError if it is no published build."""
    repo, revision = split_repo_id(repo, revision)
    if full or public_key is not None:
        return verify_folder(fetch(repo, revision, "everything"), public_key)
    remote = read_remote(client(), repo, revision or "main")
    if remote is None:
        raise ArtifactError(f"{repo} does not exist, or your token may not see it; check the name.")
    own = manifest_in(remote.files)
    if own is None or provenance.SUMS not in remote.files:
        missing = provenance.SUMS if own else " or ".join(MANIFESTS)
        raise ArtifactError(f"{repo} has no {missing}: it was not published by bagel-compress.")
    got = download(repo, remote.commit, _small(remote))
    path = got.get(own) or download(repo, remote.commit, [own])[own]  # a large manifest is in LFS, not in git
    listed, digest = listed_files(own, path.read_bytes(), Path(repo)), sha256_file(path)
    sums = provenance.sums_of(got[provenance.SUMS].parent)
    held = {n: d.partition(":")[2] if n not in got else sha256_file(got[n]) for n, d in remote.files.items()}
    faults = [f"{name} is missing" for name in sums if name not in held]
    faults += [f"{name} is not what was released" for name in sums if name in held and held[name] != sums[name]]
    faults += [f"{name} is not in {provenance.SUMS}" for name in sorted(held.keys() - sums.keys()) if _covered(name)]
    faults += _against_manifest(got[provenance.SUMS].parent, listed, own, digest)
    signature = "not checked (give --key)" if provenance.SIGNATURE in held else "none"
    how = "small files read, large ones by the digests that the Hub lists (--full reads them)"
    return Verdict(f"{repo}@{remote.commit[:12]}", digest, len(sums), how, signature, tuple(faults))


def _small(remote: Remote) -> list[str]:
    """Files that are stored in git itself: small by the Hub's rules, and listed with a sha1 only."""
    return [name for name, digest in remote.files.items() if digest.startswith("sha1:")]


def _covered(name: str) -> bool:
    return name not in provenance.NOT_SUMMED


def _against_manifest(folder: Path, files: Files, own: str, digest: str) -> list[str]:
    """Phrases for files whose digests in manifest, SHA256SUMS and provenance statement do not agree.

    `files` are the manifest's; `own` and `digest` are the name and the sha256 of the manifest itself.
    """
    sums, subjects = provenance.sums_of(folder), provenance.subjects(folder)
    faults = [
        f"{name} has another digest in {provenance.SUMS} or {provenance.PROVENANCE} than in the manifest"
        for name, entry in files.items()
        if subjects.get(name) != {"sha256": sums.get(name), **entry.digests}
    ]
    return faults + ([f"{own} is not the one of {provenance.SUMS}"] if sums.get(own) != digest else [])


def _stale_reports(publishable: Publishable) -> list[str]:
    """Phrases for reports of another build. A build without reports is not a fault."""
    if not (publishable.path / REPORTS).is_dir():
        return []
    return [fault for fault in load_reports(publishable)[1] if "another build" in fault]


def _signature(folder: Path, public_key: Path | None) -> tuple[str, list[str]]:
    if public_key is None:
        return "not checked (give --key)", []
    try:
        provenance.check_signature(folder, public_key)
    except GateError as error:
        return "not valid", [str(error).rstrip(".")]
    return "valid", []
