"""loader_table: which loaders open an artifact, from the rules that stand beside each codec (codecs/loaders.py)."""

from __future__ import annotations

from bagel_compress.build.artifact import Artifact
from bagel_compress.codecs.loaders import ACCELERATE, DECODED, MIXED, OURS, RAW, Loader

HEAD = ("loader", "from version", "result", "GPUs", "note", "shown by")
UNRUN = "reading its source"


def loaders_of(artifact: Artifact) -> list[Loader]:
    """The rules that hold for this artifact: those of every build, and of its one format, of none, or of a mixture."""
    codecs = {unit.codec.format: unit.codec for unit in artifact.manifest.units.values() if not unit.codec.stored_as_is}
    if not codecs:
        return [*OURS, *RAW]
    if len(codecs) > 1:
        return [*OURS, DECODED, MIXED, ACCELERATE]
    (codec,) = codecs.values()
    return [*OURS, *codec.loaders(), DECODED, ACCELERATE]


def loader_rows(artifact: Artifact) -> list[tuple[str, ...]]:
    """One row per loader, in the order of HEAD."""
    return [
        (rule.name, rule.version, rule.result, rule.gpus, rule.note, rule.proof or UNRUN)
        for rule in loaders_of(artifact)
    ]
