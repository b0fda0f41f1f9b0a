"""Verbs of the group "judge"."""

from __future__ import annotations

from typing import Any


def register(verbs: Any) -> None:
    """Adds this group's parsers to `verbs` (an argparse sub-parsers action)."""
