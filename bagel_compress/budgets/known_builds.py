"""Finished builds that `advise` ranks beside the packaged recipes: local folders, and repositories on the Hub.

Of a repository only the manifest is downloaded, since it has every size. Only builds of the released model are ranked,
since predictions are made for its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bagel_compress.budgets.fake_model import BuildOutline
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.errors import ArtifactError
from bagel_compress.io.hub_client import download, listing, parse_repo_id, split_repo_id
from bagel_compress.source.released_header import TrueHeader


@dataclass(frozen=True, slots=True)
class KnownBuild:
    """A finished build."""

    name: str  # the folder, or the repository as the user wrote it
    build: BuildOutline
    download: int = 0  # bytes to download before it can be used; 0 for a local folder


def known_builds(names: Iterable[str | Path], say: Callable[[str], None] = lambda text: None) -> list[KnownBuild]:
    """The builds under these names: folders of builds, folders of such folders, Hub ids (owner/name[@revision]).

    Builds that are not of the released model are left out, and `say` is called with a sentence on each. Raises
    ArtifactError if a name holds no build, HubError if the Hub or a repository cannot be read.
    """
    found = []
    for name, artifact, is_local in _opened(names):
        units, released = artifact.units(), sum(spec.numel for spec in TrueHeader().specs)
        numel = sum(unit.numel for unit in units)
        if numel != released:
            say(f"{name} is left out: it has {numel:,} weights, the released model has {released:,}")
        elif is_local:
            found.append(KnownBuild(name, BuildOutline.of_artifact(artifact)))
        else:
            build = BuildOutline.of_manifest(artifact)
            found.append(KnownBuild(name, build, build.disk))
    return found


def _opened(names: Iterable[str | Path]) -> Iterator[tuple[str, Artifact, bool]]:
    """Yields (name, build, whether all its files are local)."""
    for given in names:
        name, folder = str(given), Path(given)
        if folder.exists():
            inside = (
                [folder] if (folder / MANIFEST).is_file() else sorted(p.parent for p in folder.glob(f"*/{MANIFEST}"))
            )
            if not inside:
                raise ArtifactError(f"{name} holds no build: neither it nor a folder in it has a {MANIFEST}.")
            for path in inside:
                yield str(path), Artifact.open(path), True
        elif parse_repo_id(name) is None:
            raise ArtifactError(f"{name} is neither a local folder nor the name of a repository (owner/name).")
        else:
            yield name, _on_the_hub(name), False


def _on_the_hub(name: str) -> Artifact:
    repo, revision = split_repo_id(name)
    commit, files = listing(repo, revision)
    if MANIFEST not in files:
        raise ArtifactError(f"{name} has no {MANIFEST}: it is not a build of bagel-compress, or is unfinished.")
    return Artifact.open(download(repo, commit, [MANIFEST])[MANIFEST].parent, check=False)
