"""Open answers of MMMU, scored without a judge by the rules of its own scripts (`eval/eval_utils.py` of MMMU).

What an answer says are its key phrases (what follows "is", "so", "answer", ..., the shortest of each sentence) and all
numbers in them. It is right if a number equals an accepted one to two decimals, or if a phrase holds an accepted text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")  # a key phrase follows
NO_PHRASE = frozenset(":,.!?;'")
SENTENCE_END = re.compile(r"\.\s(?=[A-Z])|\n")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def says(answer: str, accepted: Iterable[str]) -> bool:
    """Whether an answer says one of the accepted ones."""
    wanted = [form for text in accepted for form in _forms(text)]
    phrases = _key_phrases(answer)
    said = [*phrases, *(n for phrase in phrases for pattern in NUMBERS for n in pattern.findall(phrase))]
    for form in (form for text in said for form in _forms(text)):
        if form in wanted if isinstance(form, float) else any(isinstance(w, str) and w in form for w in wanted):
            return True
    return False


def _key_phrases(answer: str) -> list[str]:
    """The answer in lower case before it is cut, so sentences end at line breaks alone, as in the official script."""
    text = answer.strip().strip(".").lower()
    parts = SENTENCE_END.split(text)
    found = []
    for number, part in enumerate(parts):
        leads = (*LEADS, "=") if number == len(parts) - 1 else LEADS
        tails = [tail for lead in leads if lead in part and (tail := part.rsplit(lead, 1)[1].strip())]
        if tails and (shortest := min(tails, key=len)) not in NO_PHRASE:
            found.append(shortest)
    return found or [text]


def _forms(text: str) -> list[float | str]:
    """A number to two decimals; a text in lower case, a single letter with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
