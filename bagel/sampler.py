"""The reference sampler: turns of text and pictures in, text or a picture out.

    sampler = Sampler.from_dir(folder)
    sampler.run(["a red cat"], size=(1024, 1024), seed=1).image            text to image
    sampler.run([picture, "make it night"], flow=EDIT_FLOW, seed=1).image  editing
    sampler.run([picture, "what is this?"], output="text").text            understanding
    think=True lets the model plan in words first, in all of them.

The script of a run is in `bagel.loops`; here are its torch parts. A listener (`bagel.events`) receives every
token and step and may change them, so watching, recording, replaying or stopping a run needs no second sampler.
Randomness comes from an explicit CPU generator or from given tensors. A guidance branch that equals another
branch is not evaluated a second time (`share_branches = False` evaluates all of them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bagel import flow as rectified
from bagel.branches import Branches, Noise
from bagel.context import Context
from bagel.events import Drawing, Listener, Step, StepInput
from bagel.flow import FlowSettings
from bagel.inputs import TextCodec, resized, to_tensor
from bagel.loading import load_bagel, load_vae
from bagel.loops import Loops, Request, Result, Turn
from bagel.model import Bagel
from bagel.settings import EDIT_FLOW, TextSettings
from bagel.static_step import Run, StepRuntime, Steps, compiled_velocity
from bagel.threads import one_thread, too_small_to_share
from bagel.vae import AutoEncoder, to_uint8

__all__ = [
    "EDIT_FLOW", "Branches", "FlowSettings", "Listener", "Noise", "Request", "Result", "Sampler", "Step", "TextCodec",
    "TextSettings", "Turn",
]  # fmt: skip


class Sampler(Loops):
    """A model with its VAE and tokenizer.

    `step_runtime` is how denoising steps run: "eager", or as `bagel.static_step` describes it. `compile_backend` is the
    torch.compile backend of "compiled".
    """

    step_runtime: StepRuntime = "eager"
    compile_backend: str | Callable[..., object] = "inductor"
    _compiled: tuple[object, Run] | None = None  # the backend, and what it compiled

    def __init__(self, bagel: Bagel, vae: AutoEncoder, text: TextCodec) -> None:
        self.bagel: Bagel = bagel
        self.vae, self.text = vae, text

    @classmethod
    def from_dir(
        cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> Sampler:
        """Loads a full-precision checkpoint folder in the official layout. Raises BagelError on anything missing."""
        folder, device = Path(folder), torch.device(device)
        return cls(load_bagel(folder, device, dtype), load_vae(folder, device), TextCodec.from_dir(folder))

    def running(self) -> AbstractContextManager[None]:
        return one_thread() if too_small_to_share(self.bagel.config.llm) else nullcontext()

    # --- steps --------------------------------------------------------------------------------------------------------

    def passes(self, drawing: Drawing, work: StepInput, contexts: Sequence[Sequence[Context]]) -> list[Tensor]:
        if self.step_runtime == "eager" or work.tap:
            return super().passes(drawing, work, contexts)
        if "steps" not in drawing.kept:
            drawing.kept["steps"] = Steps(
                self.step_runtime, self._compiler() if self.step_runtime == "compiled" else None
            )
        steps, x, t = drawing.kept["steps"], work.x, work.t
        if self.merge_branches:
            together, count = [context for branch in contexts for context in branch], len(contexts)
            v = steps.velocity(self.bagel, together, list(drawing.grids) * count, self.wrap, x.repeat(count, 1), t)
            return list(v.chunk(count))
        return [steps.velocity(self.bagel, c, drawing.grids, self.wrap, x, t) for c in contexts]

    def _compiler(self) -> Run:
        """Kept for later pictures, which then need no compilation."""
        if self._compiled is None or self._compiled[0] is not self.compile_backend:
            self._compiled = self.compile_backend, compiled_velocity(self.compile_backend)
        return self._compiled[1]

    # --- randomness ---------------------------------------------------------------------------------------------------

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator)

    def choose(self, logits_BV: Tensor, settings: TextSettings, generators: Sequence[torch.Generator]) -> list[int]:
        if not settings.do_sample:
            return logits_BV.argmax(dim=-1).tolist()
        probabilities_BV = torch.softmax(logits_BV.float().cpu() / settings.temperature, dim=-1)
        rows = zip(probabilities_BV, generators, strict=True)
        return [int(torch.multinomial(row_V, 1, generator=generator)) for row_V, generator in rows]

    # --- flow ---------------------------------------------------------------------------------------------------------

    def schedule(self, flow: FlowSettings) -> Tensor:
        return rectified.schedule(flow.num_timesteps, flow.timestep_shift)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def start(self, x: Tensor) -> Tensor:
        return x.to(self.bagel.device, torch.float32)

    def guide(self, v: Tensor, v_text: Tensor, v_image: Tensor | None, flow: FlowSettings) -> Tensor:
        return rectified.guide(v, v_text, v_image, flow)

    def euler(self, x: Tensor, v: Tensor, dt: Tensor) -> Tensor:
        return rectified.euler(x, v, dt)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def pixels(self, image: Image.Image) -> Tensor:
        return to_tensor(image)

    @torch.no_grad()
    def encode(self, image: Image.Image, noise: Noise) -> Tensor:
        pixels_CHW = to_tensor(resized(image, self.bagel.config.vae_rule))
        factor, z = self.bagel.config.vae_downsample, self.bagel.config.latent_channels
        draw = noise((1, z, pixels_CHW.shape[1] // factor, pixels_CHW.shape[2] // factor))
        device = next(self.vae.parameters()).device
        return self.vae.encode(pixels_CHW[None].to(device), draw.to(device, torch.float32))[0]

    def picture(self, packed: Tensor, grid: tuple[int, int]) -> Image.Image:
        return Image.fromarray(self.decode(packed, grid).permute(1, 2, 0).cpu().numpy())

    @torch.no_grad()
    def decode(self, packed: Tensor, grid: tuple[int, int]) -> Tensor:
        """Packed latent -> picture as uint8 [3, H, W], where the VAE is."""
        latent = self.bagel.unpack_latent(packed, *grid)[None]
        device = next(self.vae.parameters()).device
        return to_uint8(self.vae.decode(latent.to(device, torch.float32)))[0]
