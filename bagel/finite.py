"""Stops a run on NaN or infinity, which would otherwise become a black picture or an arbitrary token."""

from __future__ import annotations

import math
from typing import Any

from bagel.errors import BagelError


def check_finite(what: str, values: Any) -> None:
    """Raises BagelError if an array of torch or numpy holds NaN or infinity. `what` names it: "the logits"."""
    if not bool((abs(values) < math.inf).all()):  # NaN is not smaller than anything
        raise BagelError(
            f"{what} hold values that are not finite (NaN or infinity): a weight is damaged, or a setting is far out of"
            " range; verify the model's files, then try the default settings."
        )
