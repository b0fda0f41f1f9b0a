"""Downloads full-precision checkpoints from the Hub: only the files that are needed; broken downloads are resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bagel.errors import BagelError
from bagel.json_file import read_object
from bagel_compress.errors import CheckpointError
from bagel_compress.io.hub_client import UnreachableError, download, listing
from bagel_compress.io.safe_paths import check_names


def fetch(repo: str, revision: str | None, small: Sequence[str], weights: Sequence[str]) -> tuple[Path, str]:
    """Downloads the `small` files that exist and the first of `weights` that exists, with its shards if it is an index.

    Returns the snapshot's folder in the cache of huggingface_hub, and its commit. If the Hub cannot be reached, the
    files of an earlier download are used. Raises HubError if the repository cannot be read, CheckpointError if it has
    none of `weights`.
    """
    try:
        names = listing(repo, revision)[1]
    except UnreachableError as error:
        return _cached(repo, revision, small, weights, error)
    chosen = next((name for name in weights if name in names), None)
    if weights and chosen is None:
        raise CheckpointError(f"{repo} has no weights; expected one of {', '.join(weights)}.")
    wanted = [name for name in small if name in names]
    if chosen is not None:
        wanted += [chosen, *_shards(download(repo, revision, [chosen])[chosen], chosen)]
    if not wanted:
        raise CheckpointError(f"{repo} has no {small[0]}; it is no BAGEL checkpoint.")
    # Downloaded under the revision as given, not its commit: the cache then finds it by that name without a network.
    return _snapshot(download(repo, revision, wanted)[wanted[0]], wanted[0])


def _cached(
    repo: str, revision: str | None, small: Sequence[str], weights: Sequence[str], cause: UnreachableError
) -> tuple[Path, str]:
    """The snapshot that an earlier download left in the cache. Raises UnreachableError if there is none."""
    from huggingface_hub import try_to_load_from_cache

    for name in weights or small:
        path = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(path, str):
            return _snapshot(Path(path), name)
    raise UnreachableError(
        f"{str(cause).partition('; ')[0]}, and {repo} is neither a local folder nor in the cache; connect to the"
        " network, or download it elsewhere and give its folder."
    ) from None


def _snapshot(path: Path, name: str) -> tuple[Path, str]:
    """The snapshot folder that a cached file `name` lies in, and the commit: the folder's name."""
    folder = path.parents[name.count("/")]
    return folder, folder.name


def _shards(path: Path, name: str) -> list[str]:
    """The weight files that an index names; none if `name` is a weight file itself."""
    if not name.endswith(".index.json"):
        return []
    try:
        weight_map = read_object(path, "the repository is damaged").get("weight_map")
    except BagelError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to files; the repository is damaged.")
    files = sorted(set(weight_map.values()))
    check_names(files, path, CheckpointError)
    return files
