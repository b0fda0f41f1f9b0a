"""Markdown for model cards: tables, and escaping of untrusted text (names of sources, prompts, texts of recipes)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def joined(*sections: str) -> str:
    """Joins the sections of a page; empty ones are left out."""
    return "\n\n".join(section for section in sections if section) + "\n"


def plain(text: object) -> str:
    """Untrusted text as one line of Markdown that renders as exactly its characters, in a table cell or outside."""
    line = re.sub(r"([\\`*_{}\[\]<>()#!|~$&:])", r"\\\1", _one_line(text))
    return re.sub(r"^([-+=]|\d+(?=[.)]))", lambda m: f"&#8203;{m[1]}", line)


def code(text: object) -> str:
    """Untrusted text as inline code that can end neither the code nor a table cell; line breaks become spaces."""
    return f"`{_one_line(text).replace('`', chr(39)).replace('|', '/')}`"


def _one_line(text: object) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. The cells have to be Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def gib(nbytes: float | None) -> str:
    """Bytes as text in GiB; "not measured" for None."""
    return "not measured" if nbytes is None else f"{nbytes / 2**30:.2f} GiB"
