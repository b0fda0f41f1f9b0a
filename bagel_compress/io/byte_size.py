"""Sizes in bytes, written for people."""

from __future__ import annotations


def size_text(nbytes: float) -> str:
    """Bytes for people: GB from 100 MB up, else MB; powers of ten."""
    return f"{nbytes / 1e9:.3f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3f} MB"
