"""Progress, previews and cancelling of a node's run, through ComfyUI's own hooks."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bagel.events import Drawing, Listener, Prefill, Step, StepInput
from bagel.loops import Loops

LATENT_CHANNELS = 16  # of the FLUX.1 VAE, whose previewers ComfyUI has


class Watch(Listener):
    """A listener that moves ComfyUI's bar, shows what is drawn or written, and stops when ComfyUI says so."""

    def __init__(self, sampler: Loops, node: str | None) -> None:
        self._sampler, self._node = sampler, node
        self._ids = [sampler.text.bos]
        self._grid = (0, 0)
        self._bar: Any = None
        self._previewer: Any = None

    def before_prefill(self, work: Prefill) -> Prefill:
        stop_if_asked()
        return work

    def before_decode(self, contexts: Sequence[Any]) -> None:
        self._ids = [self._sampler.text.bos]

    def token(self, sample: int, token: int) -> None:
        stop_if_asked()
        self._ids.append(token)
        _show_text(self._sampler.text.answer(self._ids), self._node)

    def before_denoise(self, drawing: Drawing) -> None:
        from comfy.utils import ProgressBar

        self._bar = ProgressBar(drawing.count)
        self._grid = drawing.grids[0]
        self._previewer = _previewer(self._sampler)

    def before_step(self, work: StepInput) -> StepInput:
        stop_if_asked()
        return work

    def after_step(self, step: Step) -> Step:
        picture = None
        if self._previewer is not None:
            latent = self._sampler.bagel.unpack_latent(step.preview, *self._grid)[None]
            picture = self._previewer.decode_latent_to_preview_image("JPEG", latent)
        self._bar.update_absolute(step.index + 1, step.count, picture)
        return step


@contextmanager
def giving_back() -> Iterator[None]:
    """Where a run fails or is cancelled, its contexts and latents are freed at once.

    ComfyUI keeps the exception, and with it the variables of every function that it passed through.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def stop_if_asked() -> None:
    """Raises ComfyUI's InterruptProcessingException after its Cancel button."""
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()


def _previewer(sampler: Loops) -> Any:
    """ComfyUI's previewer of FLUX.1 latents, which BAGEL's are; None if its user wants none."""
    import comfy.latent_formats
    import latent_preview

    if sampler.bagel.config.latent_channels != LATENT_CHANNELS:
        return None
    return latent_preview.get_previewer(sampler.bagel.device, comfy.latent_formats.Flux())


def _show_text(text: str, node: str | None) -> None:
    """Text on the node itself, while it is written."""
    from server import PromptServer

    server: Any = getattr(PromptServer, "instance", None)
    if node is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node)
