"""The contexts of classifier-free guidance: what each of its three branches has read so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from PIL import Image

from bagel.events import Array, Listener, Prefill
from bagel.images import resized

Noise = Callable[[tuple[int, ...]], Array]  # shape -> standard normal, fp32, CPU


class Branches:
    """The contexts of the three guidance branches for B samples, kept by the official rules.

    text-dropped: cond as it was before the last text turn, or just after the last image.
    image-dropped: every text turn and the system prompt, no image, no thoughts.
    While a branch equals cond it is not filled a second time, unless the sampler's `share_branches` is off.
    """

    def __init__(self, sampler: Any, batch: int = 1, listener: Listener | None = None) -> None:
        self._sampler, self._listener = sampler, listener or Listener()
        self.cond = [sampler.bagel.new_context() for _ in range(batch)]
        self.text_dropped = forks(self.cond)
        self._image_dropped = None if sampler.share_branches else forks(self.cond)

    @property
    def image_dropped(self) -> list[Any]:
        return self.cond if self._image_dropped is None else self._image_dropped

    @property
    def image_equals_cond(self) -> bool:
        return self._image_dropped is None

    @property
    def text_equals_cond(self) -> bool:
        return all(a.length == b.length for a, b in zip(self.text_dropped, self.cond, strict=True))

    def add_system(self, prompt: str) -> None:
        """A system prompt: a text turn that does not move the text-dropped branch."""
        self._add_text([prompt] * len(self.cond))

    def add_text(self, texts: Sequence[str]) -> None:
        """Appends one text turn per sample; the text-dropped branch stays at the state before it."""
        self.text_dropped = forks(self.cond)
        self._add_text(texts)

    def add_thoughts(self, texts: Sequence[str]) -> None:
        """Re-tokenises decoded thoughts and appends them to the cond branch only."""
        self._split_off_image_dropped()
        self.prefill("text", self._turns(texts))

    def add_image(self, images: Sequence[Image.Image], noises: Sequence[Noise] | None) -> None:
        """Appends one picture per sample (RGB, already resized by the VAE rule); no noises: ViT features only."""
        self._split_off_image_dropped()
        if noises is not None:
            self._listener.before_encode(images)
            self.prefill("latent", [self._sampler.encode(i, n) for i, n in zip(images, noises, strict=True)])
        rule = self._sampler.bagel.config.vit_rule
        self.prefill("vit", [self._sampler.pixels(resized(i, rule)) for i in images])
        self.text_dropped = forks(self.cond)

    def prefill(
        self,
        kind: Literal["text", "latent", "vit"],
        content: Sequence[Any],
        branch: Literal["cond", "image_dropped"] = "cond",
    ) -> None:
        """One pass that appends content, an entry per sample (see `events.Prefill`), to a branch."""
        work = self._listener.before_prefill(Prefill(kind, branch, getattr(self, branch), content))
        model, wrap = self._sampler.bagel, self._sampler.wrap
        if kind == "text":
            model.prefill_text(work.contexts, work.content, work.tap)
        elif kind == "latent":
            model.prefill_latent(work.contexts, work.content, wrap, work.tap)
        else:
            model.prefill_vit(work.contexts, work.content, wrap, work.tap)
        self._listener.after_prefill(work)

    def _add_text(self, texts: Sequence[str]) -> None:
        self.prefill("text", self._turns(texts))
        if self._image_dropped is not None:
            self.prefill("text", self._turns(texts), "image_dropped")

    def _turns(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._sampler.text.turn(text) for text in texts]

    def _split_off_image_dropped(self) -> None:
        if self._image_dropped is None:
            self._image_dropped = forks(self.cond)


def forks(contexts: Sequence[Any]) -> list[Any]:
    """Independent copies of contexts; they share storage."""
    return [c.fork() for c in contexts]
