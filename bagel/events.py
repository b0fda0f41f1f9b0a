"""The events of a run, and what a listener may change in each.

    class Bar(Listener):
        def after_step(self, step: Step) -> Step:
            print(f"step {step.index + 1} of {step.count}")
            return step

    sampler.run(["a red cat"], listener=Bar())

`bagel.loops` is the only place that walks from turns to contexts to text and pictures. Whoever wants to show, record,
replay or stop a run overrides methods of `Listener`; they stand here in the order in which a run calls them. A method
that returns a value returns what the run goes on with: the value that came, or another one in its place (teacher
forcing). An error that a listener raises ends the run; `bagel.errors.Cancelled` is the one for a run that was stopped.

Arrays are the backend's: torch.Tensor, or numpy.ndarray for an exported model. Contexts belong to the run. A listener
that makes a pass of its own makes it over forks (`context.fork()`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from bagel.settings import FlowSettings

if TYPE_CHECKING:
    from bagel.branches import Branches

Array = Any  # torch.Tensor or numpy.ndarray, as the backend has it
Tap = Callable[[str, Array], None]  # name and rows of a state inside a pass


@dataclass(frozen=True, slots=True)
class Prefill:
    """A pass that appends to contexts. `content` and `contexts` have one entry per sample.

    `tap` sees the states inside the pass (which then leaves nothing out); None costs nothing.
    """

    kind: Literal["text", "latent", "vit"]
    branch: Literal["cond", "image_dropped"]
    contexts: Sequence[Any]
    content: Sequence[Any]  # ids of a wrapped text turn; VAE latent [z, h, w]; pixels [3, H, W] in [-1, 1] for the ViT
    tap: Tap | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """What the denoising steps of a batch have in common."""

    branches: Branches
    grids: Sequence[tuple[int, int]]  # (rows, columns) of latent tokens of each sample's picture
    flow: FlowSettings
    times: Array  # fp32, from 1 (noise) down to 0 (data); steps lead from each one to the next
    kept: dict[str, Any] = field(default_factory=dict)  # what a backend keeps from step to step

    @property
    def count(self) -> int:
        """Number of steps."""
        return len(self.times) - 1

    def split(self, packed: Array) -> list[Array]:
        """Packed rows [N, ...] of all samples -> the rows of each sample; views."""
        parts, start = [], 0
        for rows, columns in self.grids:
            parts.append(packed[start : start + rows * columns])
            start += rows * columns
        return parts


@dataclass(frozen=True, slots=True)
class StepInput:
    """A denoising step that is about to be made from x (packed, [N, p*p*z], fp32) at time t."""

    index: int
    t: Array
    x: Array
    tap: Tap | None = None  # sees the states of the conditional pass


@dataclass(frozen=True, slots=True)
class Step:
    """A denoising step that was made: velocities of the branches at (x, t), the guided one, and x after it."""

    index: int
    count: int  # steps of the run
    t: Array
    x: Array
    v_cond: Array
    v_text: Array | None
    v_image: Array | None
    v: Array
    x_next: Array
    passes: int = 1  # times that the network was evaluated for it, all branches counted
    forecast: bool = False  # a velocity was forecast from earlier steps (bagel/step_cache.py)

    @property
    def preview(self) -> Array:
        """The finished latent as this step expects it, packed: x - t*v. `Sampler.picture` makes a picture of it."""
        return self.x - self.t * self.v


class Listener:
    """Base class for listeners to a run's events; every method here leaves the run unchanged."""

    # --- reading the turns --------------------------------------------------------------------------------------------

    def before_encode(self, images: Sequence[Image.Image]) -> None:
        """Input pictures, one per sample, go through the VAE; only where the output is a picture."""

    def before_prefill(self, work: Prefill) -> Prefill:
        """A text turn or a picture is appended to contexts; other content or a tap may be given."""
        return work

    def after_prefill(self, work: Prefill) -> None:
        """The turn or picture was appended: the contexts are longer."""

    # --- text ---------------------------------------------------------------------------------------------------------

    def before_decode(self, contexts: Sequence[Any]) -> None:
        """Text is decoded on these contexts, one per sample; they are forks made for that."""

    def logits(self, samples: Sequence[int], logits: Array) -> Sequence[int] | None:
        """Logits [B, V] of what follows in the samples that go on. Returns their next tokens; None: as sampled."""

    def token(self, sample: int, token: int) -> None:
        """A token became part of a sample's text. Not called for the start and end tokens."""

    def thoughts(self, texts: Sequence[str]) -> Sequence[str]:
        """Called with each sample's thoughts before a picture; the returned texts go into the contexts."""
        return texts

    # --- pictures -----------------------------------------------------------------------------------------------------

    def before_denoise(self, drawing: Drawing) -> None:
        """Contexts are complete, denoising begins."""

    def before_step(self, work: StepInput) -> StepInput | None:
        """Called before a step. The run makes the returned step; None skips the step and leaves x as it is."""
        return work

    def after_step(self, step: Step) -> Step:
        """Called after a step. The run continues from `x_next` of the returned value."""
        return step

    def before_picture(self, latents: Sequence[Array]) -> Sequence[Array]:
        """Denoising is done: the packed latent of each sample, about to be decoded by the VAE."""
        return latents
