"""What one row of data becomes before it is packed: texts and pictures in order."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


class RowError(Exception):
    """A row that cannot be used; the text says why. It is skipped, counted and named."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """A text turn. `learnt`: its tokens are predicted; otherwise it is a condition that may be dropped."""

    text: str
    learnt: bool = False


@dataclass(frozen=True, slots=True)
class PicturePart:
    """An upright RGB picture: `drawn` (noised, with loss), `clean` (as latent) and `seen` (by the ViT), in this order.

    `droppable`: the clean and seen forms are conditions that may be dropped.
    """

    image: Image.Image
    drawn: bool = False
    clean: bool = False
    seen: bool = False
    droppable: bool = True


Example = tuple[TextPart | PicturePart, ...]
