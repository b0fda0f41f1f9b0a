"""One reader of small files that somebody else wrote: bounded, and every fault of a JSON file is one sentence."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

from bagel.errors import BagelError

MOST = 32 << 20  # bytes; the largest that there is, a tokenizer.json, has 10 MB


def small_bytes(file: Path, most: int = MOST) -> bytes:
    """The content of a file. Raises OSError also on pipes and devices, which may have no end, and on large files."""
    if not file.is_file():
        missing = errno.EINVAL if file.exists() else errno.ENOENT
        raise OSError(missing, "no file" if file.exists() else "no such file", str(file))
    if (size := file.stat().st_size) > most:
        raise OSError(errno.EFBIG, f"has {size} bytes, more than any such file", str(file))
    return file.read_bytes()


def read_object(file: Path, advice: str = "copy it again from the base model") -> dict[str, Any]:
    """The JSON object in a file. Raises BagelError on anything else, also on pipes, devices and endless nesting."""
    try:
        data = json.loads(small_bytes(file))
    except OSError as error:
        raise BagelError(f"{file} cannot be read ({error.strerror}); {advice}.") from None
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, integers of 5,000 digits
        raise BagelError(f"{file} is not readable JSON ({error}); {advice}.") from None
    if not isinstance(data, dict):
        raise BagelError(f"{file} holds a {type(data).__name__}, expected a JSON object; {advice}.")
    return data
