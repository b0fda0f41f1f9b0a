"""What the model sees of a picture is what a viewer shows of it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps

from bagel.errors import BagelError
from bagel.images import bicubic, to_rgb
from bagel.inputs import grid_ids

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def reopened(image: Image.Image, form: str = "PNG", **options: Any) -> Image.Image:
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def quarters() -> Image.Image:
    """Four colours in the corners of 6 x 4: no two of its eight turns are the same."""
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:2, :3], pixels[:2, 3:], pixels[2:, :3] = RED, BLUE, WHITE
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_a_picture_is_turned_as_its_exif_says(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = reopened(quarters(), form, exif=exif)
    found = to_rgb(stored)
    assert found.size == ((6, 4) if orientation < 5 else (4, 6))
    assert np.array_equal(found, ImageOps.exif_transpose(stored))


def test_a_phones_portrait() -> None:
    """Orientation 6: the left column of the stored picture is its top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    found = np.asarray(to_rgb(reopened(quarters(), "PNG", exif=exif)))
    assert found.shape == (6, 4, 3)
    assert tuple(found[0, 3]) == RED
    assert tuple(found[5, 3]) == BLUE
    assert tuple(found[0, 0]) == WHITE


@pytest.mark.parametrize("exif", [b"", b"Exif\x00\x00II*\x00", b"Exif\x00\x00XX*\x00\x08\x00\x00\x00", b"\xff" * 40])
def test_damaged_exif_turns_nothing(exif: bytes) -> None:
    assert np.array_equal(to_rgb(reopened(quarters(), "PNG", exif=exif)), quarters())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_of_every_kind_is_on_white(mode: str) -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 255, 51)):
        image.putpixel((x, 0), (0, 0, 0, alpha))
    if mode in ("LA", "La"):
        image = image.convert("LA")
    if mode != image.mode:
        image = image.convert(mode)
    found = np.asarray(to_rgb(image)).astype(int)
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == [0, 0, 0]
    assert abs(found[0, 2] - 204).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_colour_is_white(mode: str) -> None:
    image = Image.new("RGB", (2, 1), (0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0) if mode in ("P", "RGB") else (255, 255, 255))
    image = image.convert(mode)
    image.info["transparency"] = (0, 0, 0) if mode == "RGB" else image.getpixel((0, 0))
    found = np.asarray(to_rgb(image))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == [255, 0, 0] if mode in ("P", "RGB") else [255, 255, 255]


def test_a_palette_with_alpha() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    stored = reopened(image, "PNG", transparency=b"\x00\xff")
    assert np.asarray(to_rgb(stored)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_grey_of_16_bits() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 254, 255]
    for image in (
        Image.fromarray(values),
        reopened(Image.fromarray(values)),
        reopened(Image.fromarray(values), "TIFF"),
    ):
        assert np.asarray(to_rgb(image))[0].tolist() == [[v] * 3 for v in expected]
    clear = Image.fromarray(values)
    clear.info["transparency"] = 257
    assert np.asarray(to_rgb(clear))[0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("mode", "value", "expected"), [
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("YCbCr", (76, 85, 255), (254, 0, 0)), ("HSV", (0, 255, 255), (255, 0, 0)),
    ("1", 1, WHITE), ("L", 9, (9, 9, 9)), ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
])  # fmt: skip
def test_other_modes(mode: str, value: Any, expected: tuple[int, int, int]) -> None:
    assert to_rgb(Image.new(mode, (1, 1), value)).getpixel((0, 0)) == expected


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_modes_without_one_meaning_are_refused(mode: str) -> None:
    with pytest.raises(BagelError, match=f"stored as {mode}, expected"):
        to_rgb(Image.new(mode, (2, 2)))


def test_the_order_of_the_passes_does_not_depend_on_pillow() -> None:
    """Pillow 12 and 13 resize in another order; the sampler resizes as 13 does, and both orders occur below."""
    rng, orders = np.random.default_rng(0), set()
    for width, height, sides in ((76, 52, (32, 32)), (52, 76, (32, 32)), (60, 90, (60, 30)), (64, 48, (96, 112))):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = np.asarray(bicubic(image, sides))
        passes = {
            "horizontal": image.resize((sides[0], height), Image.Resampling.BICUBIC),
            "vertical": image.resize((width, sides[1]), Image.Resampling.BICUBIC),
        }
        first = "vertical" if height - sides[1] > max(0, 2 * (width - sides[0])) else "horizontal"
        assert np.array_equal(found, np.asarray(passes[first].resize(sides, Image.Resampling.BICUBIC)))
        orders.add(first)
        if int(PIL.__version__.split(".")[0]) >= 13:
            assert np.array_equal(found, np.asarray(image.resize(sides, Image.Resampling.BICUBIC)))
    assert orders == {"horizontal", "vertical"}


@pytest.mark.parametrize("rows", [1, 2, 49, 70])
def test_interpolated_position_ids_are_one_for_each_patch(rows: int) -> None:
    """1 / (1 / 49) is a little more than 49, so a range of steps of 1 / 49 that ended at 1 would have 50 entries."""
    assert grid_ids(rows, 3, 70, interpolate=True).numel() == 3 * rows
