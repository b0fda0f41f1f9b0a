"""Strategies that damage a document where it has structure: hostile values, keys that are gone, values swapped."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

# Placeholders that `as_text` writes as what a JSON library cannot: 5,000 digits, 3,000 brackets.
DIGITS, DEEP = "@@digits@@", "@@deep@@"
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 10**9, 2**31, 2**63, 2**64, -(2**63), 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "x" * 5000, "\0", "\x1b[31m\u202e", "../../etc/passwd", "/dev/zero", "C:\\x", "9" * 40, "1e999",
    "(a+)+$" * 4,    [], {}, [[]], [None], {"a": 1}, {"": {}}, [1] * 300, ["x"] * 3, DIGITS, DEEP,
)  # fmt: skip
Path = tuple[Any, ...]


def paths(document: Any, at: Path = ()) -> list[Path]:
    """Where values stand in a JSON document; of long lists only the first few."""
    found = [at]
    if isinstance(document, dict):
        for key in list(document)[:40]:
            found += paths(document[key], (*at, key))
    elif isinstance(document, list):
        for number in range(min(len(document), 3)):
            found += paths(document[number], (*at, number))
    return found


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three changes."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(paths(document)))
        if not where:
            continue
        parent = document
        for key in where[:-1]:
            parent = parent[key]
        change = draw(st.sampled_from(("replace", "replace", "delete", "rename", "wrap", "swap")))
        if change == "replace":
            parent[where[-1]] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif change == "delete":
            del parent[where[-1]]
        elif change == "rename" and isinstance(parent, dict):
            name = draw(st.sampled_from([value for value in HOSTILE if isinstance(value, str)]))
            parent[name] = parent.pop(where[-1])
        elif change == "wrap":
            parent[where[-1]] = [parent[where[-1]]]
        elif change == "swap":
            other = draw(st.sampled_from(paths(document)))
            value: Any = document
            for key in other:
                value = value[key]
            parent[where[-1]] = copy.deepcopy(value)
    return document


@st.composite
def flipped(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with some changed, cut off, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(("set", "cut", "insert", "drop", "double")))
        if change == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif change == "cut":
            del data[at:]
        elif change == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif change == "drop":
            del data[at : at + draw(st.integers(1, 16))]
        else:
            data[at:at] = data[at : at + 32]
    return bytes(data)


def as_text(document: Any) -> bytes:
    """JSON, which is YAML too, with what the placeholders stand for."""
    text = json.dumps(document)
    return text.replace(f'"{DIGITS}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000).encode("utf-8")


def hostile(document: Any) -> st.SearchStrategy[bytes]:
    """Contents of a JSON or YAML file that began as `document`."""
    return st.one_of(damaged(document).map(as_text), damaged(document).map(as_text), flipped(as_text(document)))
