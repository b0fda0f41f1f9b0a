"""Pictures before they become tensors: upright RGB, as a viewer shows them, and the resize rules. No torch."""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

from bagel.config import ResizeRule
from bagel.errors import BagelError

WHITE = (255, 255, 255)
# EXIF's tag 274: how the stored picture has to be turned to be upright (Exif 2.32, 4.6.4 A).
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")  # modes that Pillow itself turns into RGB rightly
TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # grey of 16 bits


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB of what a viewer shows: turned as EXIF says, transparency on white, 16 bits of grey as 8.

    Raises BagelError on a mode without one meaning as a picture, such as floating-point values.
    """
    image.load()  # Pillow rotates TIFF files while loading and then drops their orientation tag
    turn = TURNS.get(_orientation(image))
    upright = _flat(image)
    return upright if turn is None else upright.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) where it is absent or damaged, as in viewers."""
    try:
        value = image.getexif().get(ORIENTATION)
    except (SyntaxError, struct.error, ValueError, KeyError, TypeError, OSError):  # what Pillow's readers raise
        return 1
    return value if isinstance(value, int) else 1


def _flat(image: Image.Image) -> Image.Image:
    """The picture as RGB, transparency on white, not rotated."""
    if image.mode in DEEP or (image.mode == "I" and image.format == "PNG"):  # Pillow 10 opens 16-bit PNGs as I
        return _grey16(image)
    if image.mode in TRANSPARENT or (image.mode in OPAQUE and "transparency" in image.info):
        image = image.convert("LA") if image.mode == "La" else image  # Pillow knows no shorter way from La
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, WHITE)
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode in OPAQUE:
        return image.convert("RGB")
    raise BagelError(
        f"the picture is stored as {image.mode}, expected 8-bit colour, or grey of 8 or 16 bits; convert it first."
    )


def _grey16(image: Image.Image) -> Image.Image:
    """0 to 65535 as 0 to 255, rounded; the value that a PNG calls transparent becomes white."""
    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 0xFFFF:
        raise BagelError("the picture's grey values lie outside of 16 bits; convert it to an 8-bit PNG first.")
    grey = ((values + 128) // 257).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def resized_sides(width: int, height: int, rule: ResizeRule, image_count: int = 1) -> tuple[int, int]:
    """(width, height) after the rule. Both roundings are half-to-even; the pixel cap scales sides by the area ratio.

    The short-side minimum wins over the long-side maximum first; the last step then enforces the maximum.
    """
    scale = min(rule.max_size / max(width, height), 1.0)
    scale = max(scale, rule.min_size / min(width, height))
    w, h = _scaled(width, height, scale, rule.stride)
    cap = rule.max_pixels / image_count
    if w * h > cap:
        w, h = _scaled(w, h, cap / (w * h), rule.stride)
    if max(w, h) > rule.max_size:
        w, h = _scaled(w, h, rule.max_size / max(w, h), rule.stride)
    return w, h


def _scaled(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    w, h = (max(stride, round(round(side * scale) / stride) * stride) for side in (width, height))
    return w, h


def resized(image: Image.Image, rule: ResizeRule) -> Image.Image:
    """Pillow's bicubic resize by the rule; an image that already fits is returned unchanged."""
    return bicubic(image, resized_sides(image.width, image.height, rule))


def bicubic(image: Image.Image, sides: tuple[int, int]) -> Image.Image:
    """`image.resize(sides, BICUBIC)` as Pillow 13 does it, whatever Pillow is installed.

    A resize is one pass per axis, rounded to 8 bits in between, so their order shows: by up to 14 of 255 levels on
    noise. Up to Pillow 12 the horizontal pass always comes first; Pillow 13 (libImaging/Resample.c) begins with the
    vertical one where the height loses more than twice the pixels that the width does.
    """
    width, height = sides
    lost = image.height - height
    vertical_first = lost > 0 and lost > 2 * (image.width - width)
    between = (image.width, height) if vertical_first else (width, image.height)
    for step in (between, sides):
        if step != image.size:
            image = image.resize(step, Image.Resampling.BICUBIC)
    return image
