"""Reads picture files of unknown origin completely, or raises a clear error."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from bagel_compress.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

# Of all that Pillow reads: what pictures come in. Not EPS, for which it starts Ghostscript on the file.
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO", "AVIF")
FAULTS = (OSError, SyntaxError, ValueError, struct.error, LookupError, TypeError)  # what Pillow's readers raise
MAX_PIXELS = 100_000_000  # 300 MB decoded; the model looks at about one million of them


def open_picture(source: Path | BinaryIO) -> Image:
    """Opens a picture without decoding it. Raises what Pillow raises; DecompressionBombError beyond MAX_PIXELS."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is compared below
        image = Image.open(source, formats=KINDS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    return image


def read_picture(path: Path) -> Image:
    """The picture as it is stored; `bagel.images.to_rgb` converts it to upright RGB. Raises InputError.

    One of more than MAX_PIXELS is refused by what its header says, before it is decoded.
    """
    from PIL import Image

    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no file; expected a picture (PNG, JPEG, WebP, ...).")
        image = open_picture(path)
        image.load()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected a picture (PNG, JPEG, WebP, ...).") from None
    except Image.DecompressionBombError as error:
        most = MAX_PIXELS // 10**6
        raise InputError(f"{path} is too large ({error}); make it smaller, of at most {most} megapixels.") from None
    except FAULTS as error:
        raise InputError(f"{path} is not a readable picture ({error}); expected PNG, JPEG, WebP, ...") from None
    return image
