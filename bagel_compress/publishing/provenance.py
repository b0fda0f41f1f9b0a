"""Provenance: files by which anybody can check a release byte for byte and see how it was made.

    SHA256SUMS                every file but the card, for `sha256sum -c`
    reports/provenance.json   an in-toto Statement v1 with a SLSA provenance v1 predicate: source, recipe, versions of
                              the tools, reports
    model.sig                 optional: an OpenSSF Model Signing bundle over all files (extra `sign`)

The card is not covered, since its owner may edit it later. The statement contains versions of packages, but no time or
name of a machine, so the same build gives the same statement.

Formats: https://in-toto.io/Statement/v1, https://slsa.dev/spec/v1.0/provenance,
https://github.com/ossf/model-signing-spec.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bagel.json_file import small_bytes
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import SourceEntry
from bagel_compress.errors import ArtifactError, GateError, MissingExtraError
from bagel_compress.io.digests import sha256_file
from bagel_compress.io.safe_paths import stays_inside
from bagel_compress.parity.report_data import REPORTS
from bagel_compress.publishing.publishable import Publishable, manifest_name, recipe_digest_of, recipe_of, source_of

SUMS = "SHA256SUMS"
PROVENANCE = "reports/provenance.json"
SIGNATURE = "model.sig"
NOT_SUMMED = ("README.md", ".gitattributes", SUMS, SIGNATURE)
BUILD_TYPE = "https://pypi.org/project/bagel-compress/#build-v1"
LIBRARIES = ("torch", "numpy", "safetensors", "numba", "huggingface_hub")  # those whose version can change a byte


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of a release, as SHA256SUMS lists it."""

    bytes: int
    sha256: str


def sums(files: Mapping[str, ListedFile]) -> str:
    """The content of SHA256SUMS."""
    return "".join(f"{entry.sha256}  {path}\n" for path, entry in sorted(files.items()) if path not in NOT_SUMMED)


def read_sums(text: str) -> dict[str, str]:
    """Parses SHA256SUMS: path -> sha256. Raises ArtifactError on a malformed line or a path outside the folder."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        digest, _, path = line.partition("  ")
        if len(digest) != 64 or not stays_inside(path):
            raise ArtifactError(f"{SUMS} has the line {line[:80]!r}, which names no file here; do not use this folder.")
        found[path] = digest
    return found


def sums_of(folder: Path) -> dict[str, str]:
    """Reads the SHA256SUMS of a folder: path -> sha256. Raises ArtifactError if it is missing or malformed."""
    try:
        text = small_bytes(folder / SUMS).decode()
    except (OSError, UnicodeDecodeError):
        raise ArtifactError(f"{folder} has no readable {SUMS}; it was not published by bagel-compress.") from None
    return read_sums(text)


def check_sums(folder: Path) -> list[str]:
    """Reads every file; one phrase per file that is missing, changed, or not listed. Raises ArtifactError as above."""
    listed = sums_of(folder)
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    faults = [f"{path} is missing" for path in listed if path not in present]
    faults += [f"{p} was changed" for p in listed if p in present and sha256_file(folder / p) != listed[p]]
    extra = sorted(present - listed.keys() - set(NOT_SUMMED))
    return faults + [f"{p} is not in {SUMS}" for p in extra if p.partition("/")[0] not in (".cache", ".git")]


def statement(publishable: Publishable, files: Mapping[str, ListedFile]) -> dict[str, Any]:
    """The in-toto statement about a build. `files` are its own files and its reports.

    Each subject has the sha256 of SHA256SUMS and the digests of the manifest (BLAKE3 of a file or of its tensors), and
    so connects the two.
    """
    subject: list[dict[str, Any]] = [{"name": manifest_name(publishable), "digest": {"sha256": publishable.digest}}]
    for name, entry in sorted(publishable.manifest.files.items()):
        subject.append({"name": name, "digest": {"sha256": files[name].sha256, **entry.digests}})
    reports = {path: entry for path, entry in files.items() if path.startswith(f"{REPORTS}/")}
    source = source_of(publishable)
    origin = {
        "uri": f"hf://{source.name}" + (f"@{source.revision}" if source.revision else ""),
        "digest": {"blake3": source.data_blake3} if source.data_blake3 else {"sha256": source.digest},
        "annotations": {"checkpoint_digest": source.digest},
    }
    external, internal = _parameters(publishable)
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subject,
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": external,
                "internalParameters": internal,
                "resolvedDependencies": [origin, *_further_sources(source)],
            },
            "runDetails": {
                "builder": {
                    "id": "https://pypi.org/project/bagel-compress/",
                    "version": {"built": publishable.manifest.tool, **versions()},
                },
                "byproducts": [{"name": p, "digest": {"sha256": e.sha256}} for p, e in sorted(reports.items())],
            },
        },
    }


def _further_sources(source: SourceEntry) -> list[dict[str, Any]]:
    """What the weights come from besides the source: a merged adapter, a base that has what the source lacks."""
    found: list[dict[str, Any]] = []
    if (adapter := source.adapter) is not None:
        scales = {"scale_least": adapter.scales[0], "scale_largest": adapter.scales[1]}
        found.append({"name": adapter.name, "digest": {"blake3": adapter.blake3}, "annotations": scales})
    if (base := source.base) is not None:
        uri = f"hf://{base.name}" + (f"@{base.revision}" if base.revision else "")
        found.append({"uri": uri, "annotations": {"files": list(base.files), "tensors": list(base.tensors)}})
    return found


def subjects(folder: Path) -> dict[str, dict[str, str]]:
    """File -> digests, from the statement in a released folder; empty if it cannot be read."""
    try:
        found = json.loads(small_bytes(folder / PROVENANCE))
        return {str(subject["name"]): dict(subject["digest"]) for subject in found["subject"]}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return {}


def _parameters(publishable: Publishable) -> tuple[dict[str, Any], dict[str, Any]]:
    """The statement's external parameters (what the user chose) and internal ones (what followed from that)."""
    recipe = recipe_of(publishable)
    external: dict[str, Any] = {}
    if recipe is not None:
        external = {
            "recipe": recipe.model_dump(mode="json", by_alias=True),
            "recipe_sha256": recipe_digest_of(publishable),
        }
    if isinstance(publishable, Artifact):
        return external, {"plan_sha256": publishable.manifest.plan}
    manifest = publishable.manifest
    external |= {"target": manifest.target, "settings": manifest.settings.model_dump(mode="json")}
    return external, {f"{manifest.source.kind}_sha256": manifest.source.digest, "opset": manifest.opset,
                   "versions": manifest.versions}  # fmt: skip


def statement_bytes(publishable: Publishable, files: Mapping[str, ListedFile]) -> bytes:
    """The statement as JSON, the content of reports/provenance.json."""
    return (json.dumps(statement(publishable, files), indent=1, ensure_ascii=False) + "\n").encode()


def versions() -> dict[str, str]:
    """Name -> version of Python, this tool and LIBRARIES."""
    found = {"python": platform.python_version()}
    for name in ("bagel-compress", *LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def sign(folder: Path, private_key: Path) -> Path:
    """Writes model.sig with an elliptic-curve key (PEM). Raises MissingExtraError without the extra `sign`."""
    signing = _library("signing")
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(_hashing(folder))
        config.sign(folder, folder / SIGNATURE)
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{private_key} cannot sign ({error}); give an unencrypted EC key as PEM.") from None
    return folder / SIGNATURE


def check_signature(folder: Path, public_key: Path) -> None:
    """Checks model.sig. Raises GateError if it is missing, was made by another key, or does not match the files."""
    verifying = _library("verifying")
    if not (folder / SIGNATURE).is_file():
        raise GateError(f"{folder} is not signed: it has no {SIGNATURE}.")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{public_key} is not a public key that can be read ({error}); give PEM.") from None
    try:
        verifier.set_hashing_config(_hashing(folder)).verify(folder, folder / SIGNATURE)
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise GateError(f"the signature of {folder} is not valid ({reason or 'it was made by another key'}).") from None


def _hashing(folder: Path) -> Any:
    """The files that a signature covers: all but the card, the signature itself and files of download tools."""
    ignored = ("README.md", SIGNATURE, ".gitattributes", ".cache", ".git")
    config = _library("hashing").Config().set_ignored_paths(paths=[folder / p for p in ignored], ignore_git_paths=True)
    return config.set_allow_symlinks(True)  # files in the Hub's download cache are symbolic links


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError:
        raise MissingExtraError(
            "signing needs the package model-signing; install it with: pip install 'bagel-compress[sign]'."
        ) from None
