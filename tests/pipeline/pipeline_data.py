"""Where the tiny checkpoint lies, small recipes, and folders as bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

TINY = Path(__file__).parents[1] / "data" / "golden" / "checkpoint"
RAW = "name: raw\nrules: [{match: {}, codec: raw}]"
NF4 = """
name: nf4
rules:
  - match: {component: llm, kind: linear}
    codec: {format: nf4, double_quant: true}
  - match: {}
    codec: raw
"""

Write = Callable[..., Path]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
