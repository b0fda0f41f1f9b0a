"""Fetching a checkpoint from the Hub: only the files that are needed, resumable, one clear sentence without network."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from bagel_compress.errors import CheckpointError


def fetch(repo: str, revision: str | None, small: Sequence[str], weights: Sequence[str]) -> tuple[Path, str]:
    """Downloads `small` files where they exist and the first of `weights` that exists, with its shards if an index.

    Returns the local snapshot folder and the commit it shows. huggingface_hub resumes what was interrupted.
    Raises CheckpointError if the repository cannot be reached or has none of `weights`.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    unreachable: tuple[type[Exception], ...] = (
        OSError,
        OfflineModeIsEnabled,
        LocalEntryNotFoundError,
        *transport_errors(),
    )
    interrupted: tuple[type[Exception], ...] = (HfHubHTTPError, *unreachable)
    try:
        info = HfApi().model_info(repo, revision=revision)
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{repo} cannot be read from the Hub ({first_line(error)}); check its name and your access."
        ) from None
    except unreachable as error:
        return _cached(repo, revision, small, weights, error)
    names = [s.rfilename for s in info.siblings or ()]
    chosen = next((name for name in weights if name in names), None)
    if weights and chosen is None:
        raise CheckpointError(f"{repo} has no weights; expected one of {', '.join(weights)}.")
    wanted = [name for name in small if name in names]
    try:
        if chosen is not None:
            wanted += [chosen, *_shards(Path(hf_hub_download(repo, chosen, revision=revision)), chosen)]
        # By the name that was asked for, not by its commit: the cache then knows the name without network too.
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[_escaped(name) for name in wanted]))
    except interrupted as error:
        reason = first_line(error)
        raise CheckpointError(
            f"the download of {repo} broke off ({reason}); the same command goes on from there."
        ) from None
    return folder, folder.name


def _cached(
    repo: str, revision: str | None, small: Sequence[str], weights: Sequence[str], cause: Exception
) -> tuple[Path, str]:
    """What an earlier download left, used when the Hub cannot be reached."""
    from huggingface_hub import try_to_load_from_cache

    for name in weights or small:
        path = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(path, str):
            folder = Path(path).parents[name.count("/")]
            return folder, folder.name
    raise CheckpointError(
        f"{repo} is not a folder here and the Hub cannot be reached ({first_line(cause)});"
        " connect to the network, or download it elsewhere and give its folder."
    ) from None


def _shards(path: Path, name: str) -> list[str]:
    if not name.endswith(".index.json"):
        return []
    try:
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError):
        raise CheckpointError(
            f"{path} has no weight_map from tensor names to files; the repository is damaged."
        ) from None


def transport_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub's HTTP library raises; which library that is depends on its version."""
    errors: list[type[Exception]] = []
    for library in ("httpx2", "httpx", "requests"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(library)
            errors.append(module.RequestException if library == "requests" else module.HTTPError)
    return tuple(errors)


def _escaped(name: str) -> str:
    return name.translate({ord(c): f"[{c}]" for c in "[*?"}) if any(c in name for c in "[*?") else name


def first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
