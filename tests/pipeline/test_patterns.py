"""Patterns from files match as `re` would, and never for long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_compress.source.patterns import PatternError, first_match, fullmatch

ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[0-9a-c]", r"[^\d.]", "x", "1", "^", "$"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(inner, inner).map(lambda p: f"({p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{1,2}", "{2}"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
    ),
    max_leaves=8,
)


@given(PATTERNS, st.text("ab.1x", max_size=8))
@settings(max_examples=400, deadline=None)
def test_agrees_with_re(pattern: str, text: str) -> None:
    assert fullmatch(pattern, text) == (re.fullmatch(pattern, text) is not None)


HARD = (r"(a+)+$", r"(.*)*x", r"((a|a)*)*b", r"(\w+\.?)+!", r"(.*a){20}", "(" * 90 + ")" * 90)


@pytest.mark.parametrize("pattern", HARD)
def test_ends_soon_whatever_the_pattern(pattern: str) -> None:
    begun = time.perf_counter()
    assert fullmatch(pattern, "a" * 60) == (pattern in (r"(a+)+$", r"(.*a){20}"))
    assert time.perf_counter() - begun < 1


@pytest.mark.parametrize("pattern", ["(){1000000000}", "(a*){100000}", "((a*){900}){900}"])
def test_too_many_steps_are_refused(pattern: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(PatternError, match="takes too long"):
        fullmatch(pattern, "a" * 60)
    assert time.perf_counter() - begun < 1


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(", "is no regular expression"),
        ("a" * 1001, "has 1001 characters"),
        (r"(a)\1", "back-references"),
        ("(?=a)a", "look-around"),
        (r"\ba", "word boundaries"),
        ("(?i)a", "inline flags"),
        ("(?i:a)", "inline flags"),
        ("a++", "possessive"),
        ("a{99999999999999999999}", "is no regular expression"),
    ],
)
def test_what_is_refused(pattern: str, says: str) -> None:
    with pytest.raises(PatternError, match=says):
        fullmatch(pattern, "aa")


def test_the_first_pattern_that_ends_the_name() -> None:
    patterns = ("k_proj", "q_proj|o_proj", r"layers\.1\..*", "_proj")
    assert first_match(patterns, "a.layers.1.q_proj") == "q_proj|o_proj"
    assert first_match(patterns, "a.layers.1.v_proj") == r"layers\.1\..*"
    assert first_match(patterns, "a.layers.0.v_proj") is None
    assert first_match(patterns, "k_proj") == "k_proj"
    assert first_match(patterns, "a.k_proj_moe_gen") is None
