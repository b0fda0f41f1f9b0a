"""The two things that can be published, artifacts and exports, and what they have in common."""

from __future__ import annotations

from pathlib import Path

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import EXPORT_MANIFEST, MANIFEST, SourceEntry
from bagel_compress.build.recipe import Recipe
from bagel_compress.exporting.manifest import UNFINISHED, ExportFolder

Publishable = Artifact | ExportFolder


def open_publishable(path: str | Path) -> Publishable:
    """Opens an artifact or an export. Raises ArtifactError if the folder is neither, or not complete."""
    folder = Path(path)
    is_export = (folder / EXPORT_MANIFEST).exists() or (folder / UNFINISHED).exists()
    return ExportFolder.open(folder) if is_export else Artifact.open(folder)


def manifest_name(publishable: Publishable) -> str:
    """The file name of the manifest."""
    return MANIFEST if isinstance(publishable, Artifact) else EXPORT_MANIFEST


def source_of(publishable: Publishable) -> SourceEntry:
    """The full-precision checkpoint that it was made from."""
    return publishable.manifest.source if isinstance(publishable, Artifact) else publishable.manifest.source.checkpoint


def recipe_of(publishable: Publishable) -> Recipe | None:
    """The recipe of its weights; None for an export of an uncompressed checkpoint."""
    return publishable.manifest.recipe if isinstance(publishable, Artifact) else publishable.manifest.source.recipe


def recipe_digest_of(publishable: Publishable) -> str:
    """The digest of its recipe; empty if it has none."""
    if isinstance(publishable, Artifact):
        return publishable.manifest.recipe_digest
    return publishable.manifest.source.recipe.digest if publishable.manifest.source.recipe else ""


def label(publishable: Publishable) -> str:
    """The name used in receipts, tables and commits: that of the recipe, with the target for most exports."""
    recipe = recipe_of(publishable)
    if isinstance(publishable, Artifact) or recipe is None or recipe.export == publishable.manifest.target:
        return recipe.name if recipe else publishable.manifest.target  # type: ignore[union-attr]
    return f"{recipe.name}-{publishable.manifest.target}"


def weights_bytes(publishable: Publishable) -> int:
    """Bytes of all stored weights; of an export's engines, if it has any, since they contain the weights."""
    if isinstance(publishable, Artifact):
        return sum(group.nbytes for group in publishable.groups())
    blocks, files = publishable.manifest.blocks.values(), publishable.manifest.files
    return sum(files[name].bytes for name in {b.engine or b.data for b in blocks})
