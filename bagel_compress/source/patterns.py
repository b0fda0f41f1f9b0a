"""Regular expressions that came with a file, matched in bounded time.

Python's `re` backtracks: a pattern of thirty characters from an adapter's config can hold a process for minutes. Here
the parsed pattern is followed by sets of positions instead, and every step is counted, so that a match ends soon or is
refused. Groups, alternatives, classes and repeats mean what they mean to `re`; look-around, back-references and inline
flags are refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

MAX_PATTERN = 1000  # characters
MAX_STEPS = 20_000  # positions visited per match; a plain pattern on a module name takes a few hundred

_parser: Any = importlib.import_module("re._parser")  # what `re.compile` itself parses with, since Python 3.11
_CATEGORIES = {
    "CATEGORY_DIGIT": str.isdecimal, "CATEGORY_SPACE": str.isspace, "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}  # fmt: skip


class PatternError(ValueError):
    """A pattern that is no regular expression, uses what is refused, or takes too long. Says which, as a clause."""


def fullmatch(pattern: str, text: str) -> bool:
    """Whether `re.fullmatch(pattern, text)` would find a match. Raises PatternError."""
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"has {len(pattern)} characters, at most {MAX_PATTERN} are taken")
    try:
        parsed = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"is no regular expression ({error})") from None
    if parsed.state.flags & ~re.UNICODE:
        raise PatternError("sets inline flags, which are not taken")
    try:
        return len(text) in _Walk(text).follow(parsed, {0})
    except RecursionError:
        raise PatternError("is nested too deeply") from None


class _Walk:
    """Positions of one text that a parsed pattern can lead to."""

    def __init__(self, text: str) -> None:
        self._text, self._steps = text, 0

    def follow(self, nodes: Any, starts: set[int]) -> set[int]:
        """Where the sequence of nodes can end when it begins at one of `starts`."""
        self._count(1)
        for operation, argument in nodes:
            self._count(1 + len(starts))
            starts = self._one(str(operation), argument, starts)
            if not starts:
                break
        return starts

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise PatternError("takes too long to match")

    def _one(self, operation: str, argument: Any, starts: set[int]) -> set[int]:
        if operation == "BRANCH":
            return set().union(*(self.follow(option, starts) for option in argument[1]))
        if operation == "SUBPATTERN":
            _, added, removed, nodes = argument
            if added or removed:
                raise PatternError("sets inline flags, which are not taken")
            return self.follow(nodes, starts)
        if operation in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(argument, starts)
        if operation == "AT":
            return {p for p in starts if self._at(str(argument), p)}
        return {p + 1 for p in starts if p < len(self._text) and _takes(operation, argument, self._text[p])}

    def _repeat(self, argument: Any, starts: set[int]) -> set[int]:
        least, most, nodes = argument
        for _ in range(least):
            starts = self.follow(nodes, starts)
            if not starts:
                return starts
        found, new, count = set(starts), starts, least
        while new and count < most:
            new = self.follow(nodes, new) - found
            found |= new
            count += 1
        return found

    def _at(self, where: str, position: int) -> bool:
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return position == 0
        if where in ("AT_END", "AT_END_STRING"):
            return position == len(self._text)
        raise PatternError("uses word boundaries, which are not taken")


def _takes(operation: str, argument: Any, character: str) -> bool:
    """Whether a node of one character takes this one."""
    if operation == "LITERAL":
        return ord(character) == argument
    if operation == "NOT_LITERAL":
        return ord(character) != argument
    if operation == "ANY":
        return character != "\n"
    if operation == "IN":
        negated = str(argument[0][0]) == "NEGATE"
        return negated != any(_in_class(str(kind), value, character) for kind, value in argument[negated:])
    raise PatternError("uses look-around, back-references or possessive repeats, which are not taken")


def _in_class(kind: str, value: Any, character: str) -> bool:
    if kind == "LITERAL":
        return ord(character) == value
    if kind == "RANGE":
        return bool(value[0] <= ord(character) <= value[1])
    name = str(value).replace("NOT_", "")
    return bool(_CATEGORIES[name](character)) != (name != str(value))


def first_match(patterns: Sequence[str], text: str) -> str | None:
    """The first pattern that matches the text from some whole name on: `q_proj` matches `a.b.q_proj`. As peft does."""
    return next((p for p in patterns if fullmatch(rf"(.*\.)?({p})$", text)), None)
