"""What a visitor may send: pictures of a known kind and a bounded size. Everything else is refused in one sentence."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from bagel_compress.app.refusals import RefusedError

KINDS = ("PNG", "JPEG", "WEBP")
SUFFIXES = [".png", ".jpg", ".jpeg", ".webp"]
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000  # 150 MB decoded; the model looks at one million of them
MAX_PROMPTS = 200


def read_picture(path: str | Path) -> Image.Image:
    """An uploaded picture, decoded. Raises RefusedError; one that is too large is refused before it is decoded."""
    file = Path(path)
    if file.stat().st_size > MAX_BYTES:
        raise RefusedError("too_many_bytes", f"{file.stat().st_size / 2**20:.0f}", MAX_BYTES >> 20)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size is asked below
            image = Image.open(file, formats=KINDS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
    except Image.DecompressionBombError:
        raise RefusedError("too_many_pixels", MAX_PIXELS // 1_000_000) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise RefusedError("no_picture") from None
    return image


def read_prompts(text: str) -> list[str]:
    """The lines of a text that are not empty. Raises RefusedError if there are none, or too many."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise RefusedError("prompts_count", len(prompts), MAX_PROMPTS)
    return prompts
