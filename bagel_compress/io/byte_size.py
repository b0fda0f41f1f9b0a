"""Sizes in bytes as text."""

from __future__ import annotations


def size_text(nbytes: float) -> str:
    """Bytes as text in GB (1e9) from 100 MB up, otherwise in MB (1e6)."""
    return f"{nbytes / 1e9:.3f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3f} MB"
