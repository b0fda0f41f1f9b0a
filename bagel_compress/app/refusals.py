"""What the page refuses, in each of its languages: a sentence of `texts` by its key."""

from __future__ import annotations

from bagel_compress.app.texts import Texts
from bagel_compress.errors import InputError


class RefusedError(InputError):
    """Something that a visitor sent and the page does not take. As text it is English."""

    def __init__(self, key: str, *values: object) -> None:
        super().__init__(Texts("en")(key, *values))
        self.key, self.values = key, values


def sentence(fault: BaseException, t: Texts) -> str:
    """What a visitor is told: the page's own sentence, or the toolkit's, which is English, after a lead."""
    return t(fault.key, *fault.values) if isinstance(fault, RefusedError) else t("toolkit_says", fault)


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Raises RefusedError on a number out of its control's range; None is a control that was left empty."""
    if value is not None and not low <= value <= high:
        raise RefusedError("out_of_range", name, value, low, high)
