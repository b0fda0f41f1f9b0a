"""Matches regular expressions from untrusted files in bounded time.

Python's `re` backtracks: a pattern of thirty characters in an adapter's config can keep it busy for minutes. Here the
parsed pattern is followed with a set of positions, as a non-deterministic automaton, and every step is counted, so that
a match either ends soon or is refused. Groups, alternatives, classes and repeats work as in `re`; look-around,
back-references and inline flags are refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

MAX_PATTERN = 1000  # characters
MAX_STEPS = 20_000  # positions visited per match; an ordinary pattern on a module name needs a few hundred

_parser: Any = importlib.import_module("re._parser")  # the parser behind `re.compile`, since Python 3.11
_CATEGORIES = {
    "CATEGORY_DIGIT": str.isdecimal, "CATEGORY_SPACE": str.isspace, "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}  # fmt: skip


class PatternError(ValueError):
    """The pattern is no regular expression, uses a refused construct, or takes too long to match.

    The message is a predicate ("sets inline flags, ..."); the caller puts the subject in front.
    """


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
    """Finds the positions in one text where a match of a parsed pattern can end."""

    def __init__(self, text: str) -> None:
        self._text, self._steps = text, 0

    def follow(self, nodes: Any, starts: set[int]) -> set[int]:
        """The positions where a match of the node sequence can end if it begins at one of `starts`."""
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
    """Whether a node that matches one character matches this one."""
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
    """The first pattern that matches the end of a dotted name: `q_proj` matches `a.b.q_proj`. This is peft's rule."""
    return next((p for p in patterns if fullmatch(rf"(.*\.)?({p})$", text)), None)
