"""Pictures before they become tensors: RGB and the resize rules. No torch."""

from __future__ import annotations

from PIL import Image

from bagel.config import ResizeRule


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency is composited on white, other modes are plainly converted."""
    if image.mode == "RGBA" or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


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
    sides = resized_sides(image.width, image.height, rule)
    return image if sides == image.size else image.resize(sides, Image.Resampling.BICUBIC)
