"""Content: what a release is of, an artifact or an export, and what the two have in common."""

from __future__ import annotations

from pathlib import Path

from bagel_compress.build.artifact import EXPORT_MANIFEST, MANIFEST, Artifact, SourceEntry
from bagel_compress.build.recipe import Recipe
from bagel_compress.exporting.manifest import NOTES, ExportFolder

Content = Artifact | ExportFolder


def open_content(path: str | Path) -> Content:
    """Raises ArtifactError if the folder is neither a complete artifact nor a complete export."""
    folder = Path(path)
    is_export = (folder / EXPORT_MANIFEST).exists() or (folder / NOTES).exists()
    return ExportFolder.open(folder) if is_export else Artifact.open(folder)


def manifest_name(content: Content) -> str:
    """File name of its manifest."""
    return MANIFEST if isinstance(content, Artifact) else EXPORT_MANIFEST


def source_of(content: Content) -> SourceEntry:
    """The full-precision checkpoint that it comes from."""
    return content.manifest.source if isinstance(content, Artifact) else content.manifest.source.checkpoint


def recipe_of(content: Content) -> Recipe | None:
    """The recipe of its weights; None for an export of a checkpoint as it is."""
    return content.manifest.recipe if isinstance(content, Artifact) else content.manifest.source.recipe


def recipe_digest_of(content: Content) -> str:
    """Digest of the recipe; empty where there is none."""
    if isinstance(content, Artifact):
        return content.manifest.recipe_digest
    return content.manifest.source.recipe.digest if content.manifest.source.recipe else ""


def label(content: Content) -> str:
    """The name that receipts, tables and commits give it."""
    recipe = recipe_of(content)
    if isinstance(content, Artifact) or recipe is None or recipe.export == content.manifest.target:
        return recipe.name if recipe else content.manifest.target  # type: ignore[union-attr]
    return f"{recipe.name}-{content.manifest.target}"


def weights_bytes(content: Content) -> int:
    """Bytes of all weights as stored; of engines where there are any, since they hold their own."""
    if isinstance(content, Artifact):
        return sum(group.nbytes for group in content.groups())
    blocks, files = content.manifest.blocks.values(), content.manifest.files
    return sum(files[name].bytes for name in {b.engine or b.data for b in blocks})
