"""The table of loaders that open an artifact, from the rules in codecs/loaders.py and in the codecs."""

from __future__ import annotations

from bagel_compress.build.artifact import Artifact
from bagel_compress.codecs.loaders import ACCELERATE, DECODED, MIXED, OURS, RAW, SERVED, Loader

HEAD = ("loader", "from version", "result", "GPUs", "note", "shown by")
UNRUN = "reading its source"


def loaders_of(artifact: Artifact) -> list[Loader]:
    """The rules that apply to this artifact: those of every build, and those of its format, of none or of mixtures."""
    rules = _rules(artifact)
    if artifact.manifest.recipe.serve is None:
        return rules
    return [SERVED if rule.name == SERVED.name else rule for rule in rules]


def _rules(artifact: Artifact) -> list[Loader]:
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
