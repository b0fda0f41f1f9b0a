"""Looks the words of the page up. They lie in `languages`, a file for each; `{}` in a text is filled by its caller.

A further language is one more file there, and its code in MODULES (a test compares the keys).
"""

from __future__ import annotations

from types import ModuleType

from bagel_compress.app.languages import en, zh

MODULES: dict[str, ModuleType] = {"en": en, "zh": zh}
LANGUAGES: dict[str, str] = {code: module.NAME for code, module in MODULES.items()}
TEXTS: dict[str, dict[str, str]] = {code: module.TEXTS for code, module in MODULES.items()}


class Texts:
    """The words of one language."""

    def __init__(self, language: str) -> None:
        self.language = language
        self._texts = TEXTS[language]
        self._choices: dict[str, str] = MODULES[language].CHOICES

    def __call__(self, key: str, *values: object) -> str:
        return self._texts[key].format(*values)

    def info(self, key: str) -> str | None:
        """The line under a control, if it has one."""
        return self._texts.get(f"{key}_info")

    def choice(self, value: str) -> str:
        """How a choice is shown."""
        return self._choices.get(value, value)
