"""Reads picture files of unknown origin completely, or raises a clear error."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from bagel_compress.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


def read_picture(path: Path) -> Image:
    """The picture as it is stored; `bagel.images.to_rgb` converts it to upright RGB. Raises InputError."""
    from PIL import Image

    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no file; expected a picture (PNG, JPEG, WebP, ...).")
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected a picture (PNG, JPEG, WebP, ...).") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large ({error}); make it smaller first.") from None
    except (OSError, SyntaxError, ValueError, struct.error, LookupError, TypeError) as error:  # Pillow's readers
        raise InputError(f"{path} is not a readable picture ({error}); expected PNG, JPEG, WebP, ...") from None
    return image
