"""The settings of a drawn picture, as JSON in a text chunk of its PNG file. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from bagel.settings import FlowSettings, TextSettings
from bagel_compress.errors import InputError

KEY = "bagel-compress"


def picture_settings(
    model: str, prompt: str, seed: int, size: tuple[int, int], flow: FlowSettings, thinking: TextSettings | None
) -> dict[str, Any]:
    """The settings to draw a picture again. `size` is (width, height); `thinking` is None without thoughts.

    Of the model only the name is stored, not its folder.
    """
    return {
        "model": Path(model).name, "prompt": prompt, "seed": seed, "width": size[0], "height": size[1],
        "flow": asdict(flow), "thinking": None if thinking is None else asdict(thinking),
    }  # fmt: skip


def png_info(settings: Mapping[str, Any]) -> PngInfo:
    """The settings as a text chunk, for `Image.save(..., pnginfo=)`."""
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(settings, ensure_ascii=False))
    return info


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings stored in a PNG file. Raises InputError if it has none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = str(image.info.get(KEY, ""))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected a PNG that was drawn here.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise InputError(f"{path} is no readable PNG.") from None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path} holds no settings; only pictures of `generate`, `edit` and the page do.") from None
    if not _understood(settings):
        raise InputError(f"{path} holds no settings that are understood.")
    return dict(settings)


def _understood(settings: Any) -> bool:
    """Whether a picture, which anybody may have made, holds settings of the form that `picture_settings` gives."""
    if not isinstance(settings, dict):
        return False
    flow, thinking = settings.get("flow") or {}, settings.get("thinking") or {}
    if not isinstance(flow, dict) or not isinstance(thinking, dict):
        return False
    interval = flow.get("cfg_interval", [0.0, 1.0])
    own = [value for key, value in settings.items() if key not in ("flow", "thinking")]
    values = [*own, *(value for key, value in flow.items() if key != "cfg_interval"), *thinking.values()]
    return (
        isinstance(interval, list)
        and len(interval) == 2
        and all(value is None or isinstance(value, str | int | float) for value in [*values, *interval])
    )
