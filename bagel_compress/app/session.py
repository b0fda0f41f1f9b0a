"""The models of the page, and a run that tells how far it is while it goes on.

`run` samples in a thread of its own and yields what happens: words of the thoughts, steps with previews, the result. A
preview is the latent that a step expects at the end, averaged to a small grid and decoded, so that it costs a small
part of a picture (`PREVIEW_TOKENS`) and draws nothing from the run's randomness: pictures are those of `generate`.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from bagel.errors import BagelError, Cancelled
from bagel.events import Drawing, Listener, Step
from bagel.loops import Loops, Output, Result, Turn
from bagel.settings import FlowSettings, TextSettings
from bagel_compress.app.settings import LARGEST_SEED, sizes_of

PREVIEW_TOKENS = 16  # a side of the grid that a preview is decoded from: 256 pixels of the released model
PREVIEWS = 10  # of a run
GAINS = (64, 16, 4, 1)  # of the difference picture
CLIPPED = 0.01  # share of its values that may be brighter than white


@dataclass(slots=True)
class OpenModel:
    """A model that is loaded, and what is known of it."""

    name: str
    folder: Path
    sampler: Loops
    place: str  # device or target, for people
    previews: bool = True

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Ratio -> (width, height) that it draws."""
        config = self.sampler.bagel.config
        largest = min(config.max_latent_size * config.image_stride, config.vae_rule.max_size)
        return sizes_of(largest, config.image_stride)


@dataclass(frozen=True, slots=True)
class TextSoFar:
    """Text so far: thoughts or an answer."""

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class StepMade:
    """A denoising step, with a preview now and then."""

    index: int
    count: int
    preview: Image.Image | None


@dataclass(frozen=True, slots=True)
class Finished:
    """The result."""

    result: Result
    seconds: float


Event = TextSoFar | StepMade | Finished


@dataclass(slots=True)
class Visit:
    """One visitor: how to stop the run, and the files that were drawn."""

    stop: threading.Event = field(default_factory=threading.Event)
    files: list[str] = field(default_factory=list)


def open_models(names: Sequence[str], device: str, target: str | None, trust: bool = False) -> list[OpenModel]:
    """Opens them one after the other, as `bagel_compress.open_model` does. Raises its errors."""
    from bagel_compress.api import open_model
    from bagel_compress.run.load import downloaded
    from bagel_compress.run.target import Target

    placed = None if target is None else Target.load(target)
    found = []
    for name in names:
        folder = Path(name) if Path(name).exists() else downloaded(name)
        sampler = open_model(folder, device, target=target, trust=trust)
        label = folder.resolve().name if Path(name).exists() else name
        where = target or str(getattr(sampler.bagel, "device", device))
        found.append(OpenModel(label, folder, sampler, where, placed is None or placed.residency is None))
    return found


def chosen_seed(seed: float | None) -> int:
    """The seed that was given, or a random one for 0 or none."""
    return int(seed or 0) or random.randint(1, LARGEST_SEED)


def run(
    model: OpenModel,
    turns: Sequence[Turn],
    stop: threading.Event,
    *,
    output: Output = "image",
    think: bool = False,
    size: tuple[int, int] | None = None,
    flow: FlowSettings | None = None,
    text: TextSettings | None = None,
    seed: int = 0,
) -> Iterator[Event]:
    """What happens in a run, its result last. `size` is (width, height).

    Raises Cancelled once `stop` is set, and what the run raises. A caller that goes away ends the run.
    """
    events: queue.Queue[Event | BaseException] = queue.Queue()
    watch = _Watch(model, events.put, stop)
    begun = time.perf_counter()

    def work() -> None:
        try:
            result = model.sampler.run(
                turns, output=output, think=think, size=None if size is None else size[::-1], flow=flow, text=text,
                seed=seed, listener=watch,
            )  # fmt: skip
            events.put(Finished(result, time.perf_counter() - begun))
        except (BagelError, Cancelled, RuntimeError, MemoryError, OSError) as fault:
            events.put(fault)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Finished):
                return
    finally:
        stop.set()
        thread.join()


class _Watch(Listener):
    def __init__(self, model: OpenModel, tell: Callable[[Event], None], stop: threading.Event) -> None:
        self._model, self._tell, self._stop = model, tell, stop
        self._ids = [model.sampler.text.bos]
        self._grid = (1, 1)

    def token(self, sample: int, token: int) -> None:
        self._go_on()
        self._ids.append(token)
        self._tell(TextSoFar(self._model.sampler.text.answer(self._ids), len(self._ids) - 1))

    def before_denoise(self, drawing: Drawing) -> None:
        self._go_on()
        self._grid = drawing.grids[0]

    def after_step(self, step: Step) -> Step:
        self._go_on()
        every = max(1, step.count // PREVIEWS)
        last = step.index + 1 == step.count
        wanted = self._model.previews and not last and step.index % every == every - 1
        preview = small_picture(self._model.sampler, step.preview, self._grid) if wanted else None
        self._tell(StepMade(step.index + 1, step.count, preview))
        return step

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise Cancelled


def small_picture(sampler: Loops, packed: Any, grid: tuple[int, int]) -> Image.Image:
    """A packed latent as a picture of its full size, decoded from a grid of at most PREVIEW_TOKENS a side."""
    rows, columns = grid
    k = next(k for k in range(1, max(grid) + 1) if rows // k <= PREVIEW_TOKENS and columns // k <= PREVIEW_TOKENS)
    r, c = rows // k, columns // k
    cut = packed.reshape(rows, columns, -1)[: r * k, : c * k]
    small = cut.reshape(r, k, c, k, -1).mean((1, 3)).reshape(r * c, -1)
    stride = sampler.bagel.config.image_stride
    return sampler.picture(small, (r, c)).resize((columns * stride, rows * stride), Image.Resampling.BILINEAR)


def difference(a: Image.Image, b: Image.Image) -> tuple[Image.Image, int, int]:
    """The absolute difference of two pictures, times a gain; the gain; the largest difference of a value."""
    apart = ImageChops.difference(a, b)
    values = np.asarray(apart)
    bright = float(np.quantile(values, 1 - CLIPPED))
    gain = next(gain for gain in GAINS if gain * bright <= 255)
    return apart.point(lambda value: value * gain), gain, int(values.max())
