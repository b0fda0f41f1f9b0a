"""One reader of JSON files that somebody else wrote: bounded, and every fault is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bagel.errors import BagelError

MOST = 256 << 20  # bytes; the largest that there is, a tokenizer.json, has 10 MB


def read_object(file: Path, advice: str = "copy it again from the base model") -> dict[str, Any]:
    """The JSON object in a file. Raises BagelError on anything else, also on pipes, devices and endless nesting."""
    try:
        if not file.is_file():
            raise BagelError(f"{file} is no file; {advice}.")
        if (size := file.stat().st_size) > MOST:
            raise BagelError(f"{file} has {size} bytes, more than any such file; {advice}.")
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, integers of 5,000 digits
        raise BagelError(f"{file} is not readable JSON ({error}); {advice}.") from None
    if not isinstance(data, dict):
        raise BagelError(f"{file} holds a {type(data).__name__}, expected a JSON object; {advice}.")
    return data
