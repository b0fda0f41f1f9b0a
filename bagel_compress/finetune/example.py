"""What one row of data becomes before it is packed: texts and pictures in order."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from bagel_compress.io.safe_paths import encodable


class RowError(Exception):
    """A row that cannot be used; the text says why. It is skipped, counted and named."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """A text turn. `learnt`: its tokens are predicted; otherwise it is a condition that may be dropped."""

    text: str
    learnt: bool = False

    def __post_init__(self) -> None:
        """Raises RowError on half a character, which no tokenizer takes."""
        if not encodable(self.text):
            raise RowError("a text of it holds half a character (an unpaired surrogate)")


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
