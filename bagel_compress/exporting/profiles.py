"""Ranges of the symbolic axes: derived from a target's workload, and checked when an engine is run. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bagel.config import BagelConfig
from bagel_compress.errors import ExportError
from bagel_compress.exporting.manifest import BlockEntry
from bagel_compress.run.export_settings import Range
from bagel_compress.run.target import Workload

WRAPPED = 2  # the wrapper rows of an image block


def axis_ranges(sizes: Workload, config: BagelConfig, given: Mapping[str, Range]) -> dict[str, Range]:
    """Axis -> smallest, usual and largest size, large enough for an edit in think mode with the target's sizes.

    `given` replaces the ranges of single axes. Raises ExportError on an unknown axis in it.
    """
    stride, factor = config.image_stride, config.vae_downsample
    sides = [max(a, b) for a, b in zip(sizes.image, sizes.input_image, strict=True)]
    latents = (sides[0] // stride) * (sides[1] // stride)
    patches = _patches(sizes, config)
    text = sizes.prompt_tokens + max(sizes.think_tokens, sizes.answer_tokens)
    image_rows = latents + patches + 2 * WRAPPED
    rows = max(patches + WRAPPED, sizes.prompt_tokens, sizes.think_tokens)
    wanted = {
        "tokens": Range(min=1, opt=min(sizes.prompt_tokens, rows), max=rows),
        "past_tokens": Range(min=0, opt=sizes.prompt_tokens, max=image_rows + 2 * text),
        "wrapper_tokens": Range(min=WRAPPED, opt=WRAPPED, max=WRAPPED),
        "latent_tokens": Range(min=1, opt=latents, max=latents),
        "patches": Range(min=1, opt=patches, max=patches),
        "height": Range(min=stride, opt=sides[0], max=sides[0]),
        "width": Range(min=stride, opt=sides[1], max=sides[1]),
        "latent_height": Range(min=stride // factor, opt=sides[0] // factor, max=sides[0] // factor),
        "latent_width": Range(min=stride // factor, opt=sides[1] // factor, max=sides[1] // factor),
    }
    if unknown := sorted(given.keys() - wanted.keys()):
        raise ExportError(f"axes has {unknown[0]!r}, which no block has; axes are {', '.join(wanted)}.")
    return wanted | dict(given)


def _patches(sizes: Workload, config: BagelConfig) -> int:
    from bagel.images import resized_sides

    height, width = sizes.input_image
    width, height = resized_sides(width, height, config.vae_rule)
    width, height = resized_sides(width, height, config.vit_rule)
    return (height // config.vit.patch_size) * (width // config.vit.patch_size)


def profile(entry: BlockEntry, axes: Mapping[str, Range]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Input -> its smallest, usual and largest shape. Inputs of fixed shape are left out."""
    shapes = {}
    for port in entry.inputs:
        if any(isinstance(a, str) for a in port.shape):
            sides = [(axes[a].min, axes[a].opt, axes[a].max) if isinstance(a, str) else (a,) * 3 for a in port.shape]
            shapes[port.name] = tuple(tuple(side[i] for side in sides) for i in range(3))
    return shapes


def check_shapes(block: str, entry: BlockEntry, axes: Mapping[str, Range], found: Mapping[str, Sequence[int]]) -> None:
    """Raises ExportError, naming block, axis and range, if a size is outside the range that the engine was built for.

    `found` gives the shape of each input.
    """
    for port in entry.inputs:
        shape = found[port.name]
        if len(shape) != len(port.shape):
            raise ExportError(f"block {block}: input {port.name} has {len(shape)} axes, expected {len(port.shape)}.")
        for axis, size in zip(port.shape, shape, strict=True):
            if isinstance(axis, int) and axis != size:
                raise ExportError(
                    f"block {block}: input {port.name} has shape {list(shape)}, expected {list(port.shape)}."
                )
            if isinstance(axis, str) and not axes[axis].min <= size <= axes[axis].max:
                raise ExportError(
                    f"block {block}: {axis} is {size}, the engine was built for {axes[axis].min} to {axes[axis].max};"
                    " export again for a target with larger sizes."
                )
