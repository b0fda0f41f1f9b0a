"""One prompt of a calibration set, run: the inputs that its contexts and passes get.

With a loaded model the sampler runs and what enters it is kept: latents on their way from the noise, texts that were
decoded. With given pictures nothing is sampled: the pictures' own latents are noised to times of the same schedule, and
the prompt's answer stands for a decoded text; of the model only configuration, tokenizer and VAE are needed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from bagel.branches import Branches, Noise
from bagel.events import Drawing, Listener, Step
from bagel.inputs import to_rgb, to_tensor
from bagel.sampler import Sampler, TextSettings, Turn
from bagel_compress.calibrate.calibration_set import (
    CleanLatent,
    DecodedText,
    ImagePass,
    NoisedLatent,
    RecordedSequence,
    TextPass,
)
from bagel_compress.errors import CalibrationError

if TYPE_CHECKING:
    from bagel_compress.calibrate.prompts import Job

GOLDEN = 0.6180339887498949  # fractional parts of its multiples are spread evenly, however many are taken


@dataclass(slots=True)
class Recorded:
    """Sequences of one prompt with their tensors, as a calibration set numbers them; and what was drawn."""

    readings: list[RecordedSequence] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    drawn: Image.Image | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names that a calibration set uses."""
        named = {f"picture/{i}": t for i, t in enumerate(self.pictures)}
        return named | {f"latent/{i}": t for i, t in enumerate(self.latents)}


def record_inputs(
    sampler: Sampler, job: Job, index: int, picture: Image.Image | None, given: Image.Image | None = None
) -> Recorded:
    """Runs a job. `picture` is its input picture; with `given`, a picture to be noised, the model itself is not run.

    `index` counts the jobs and decides which times are kept, so that a set as a whole covers the schedule.
    """
    return _InputRecorder(sampler, job, index, given).run(picture)


class _InputRecorder:
    def __init__(self, sampler: Sampler, job: Job, index: int, given: Image.Image | None) -> None:
        self.sampler, self.job, self.index, self.given = sampler, job, index, given
        self.found = Recorded()
        self._generator = torch.Generator().manual_seed(zlib.crc32(f"calibration {job.name}".encode()))

    @torch.no_grad()
    def run(self, picture: Image.Image | None) -> Recorded:
        job, branches = self.job, _RecordedBranches(self)
        output: Literal["image", "text"] = "text" if job.kind == "question" else "image"
        think = job.kind == "plan"
        turns: list[Turn] = [job.asked.prompt] if picture is None else [picture, job.asked.prompt]
        last = self.sampler.read(branches, [turns], output, think, [self._noise])
        made: list[DecodedText | NoisedLatent] = []
        if output == "text" or think:
            ids = self._decoded(branches)
            made.append(DecodedText(after=len(branches.trunk), ids=tuple(ids)))
            if think:
                branches.add_thoughts([self.sampler.text.answer(ids)])
        dropped: list[NoisedLatent] = []
        if output == "image":
            grid = self.sampler.grid(last[0] if last else job.size)
            steps = self._given_steps(grid) if self.given is not None else self._sampled_steps(branches, grid)
            for x, t in steps:
                self._keep_pass(branches, self.add_latent(x, grid), t, made, dropped)
        self.found.readings.append(RecordedSequence(name=job.name, trunk=tuple(branches.trunk), branches=tuple(made)))
        if dropped:
            name, trunk = f"{job.name}.image_dropped", tuple(branches.image_trunk)
            self.found.readings.append(RecordedSequence(name=name, trunk=trunk, branches=tuple(dropped)))
        return self.found

    def add_picture(self, pixels_CHW: Tensor) -> ImagePass:
        """Keeps a picture as the ViT gets it, in [-1, 1]."""
        self.found.pictures.append(((pixels_CHW + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous())
        return ImagePass(picture=len(self.found.pictures) - 1)

    def add_clean(self, latent_CHW: Tensor) -> CleanLatent:
        """Keeps a clean latent [z, h, w]."""
        patch = self.sampler.bagel.config.latent_patch_size
        grid = (latent_CHW.shape[1] // patch, latent_CHW.shape[2] // patch)
        return CleanLatent(latent=self.add_latent(self.sampler.bagel.pack_latent(latent_CHW), grid))

    def add_latent(self, packed: Tensor, grid: tuple[int, int]) -> int:
        """Keeps packed latent tokens [N, p*p*z] and returns their number."""
        self.found.latents.append(packed.reshape(*grid, -1).to("cpu", torch.bfloat16))
        return len(self.found.latents) - 1

    def _noise(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _decoded(self, branches: _RecordedBranches) -> list[int]:
        """Ids as decoded, start token first."""
        text = self.sampler.text
        if self.given is None:
            [ids] = self.sampler.decode_text(branches.cond, TextSettings(max_tokens=self.job.max_tokens))
            return ids
        if not self.job.asked.answer:
            raise CalibrationError(
                f"calibration prompt {self.job.name} has no answer, which a set of given pictures needs;"
                " add one, or make the set without --pictures."
            )
        return [text.bos, *text.encode(self.job.asked.answer)][: self.job.max_tokens]

    def _chosen(self) -> list[int]:
        """Indices of the denoising steps that are kept: evenly spread, moved on from job to job."""
        steps, times = self.job.flow.num_timesteps - 1, self.job.times
        offset = self.index * GOLDEN % 1
        return sorted({int((i + offset) / times * steps) for i in range(times)})

    def _sampled_steps(self, branches: Branches, grid: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        kept = _KeptSteps(self._chosen())
        drawing = Drawing(branches, [grid], self.job.flow, self.sampler.schedule(self.job.flow))
        x = self._noise((grid[0] * grid[1], self.sampler.bagel.config.latent_width))
        self.found.drawn = self.sampler.picture(self.sampler.denoise(drawing, x, kept), grid)
        return kept.inputs

    def _given_steps(self, grid: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        assert self.given is not None
        stride = self.sampler.bagel.config.image_stride
        fitted = ImageOps.fit(to_rgb(self.given), (grid[1] * stride, grid[0] * stride))
        latent = self._encoded(fitted)
        clean, times = self.sampler.bagel.pack_latent(latent), self.sampler.schedule(self.job.flow)
        return [((1 - t) * clean + t * self._noise(tuple(clean.shape)), t) for t in (times[i] for i in self._chosen())]

    def _encoded(self, image: Image.Image) -> Tensor:
        """VAE latent [z, h, w] of a picture in its own size."""
        vae, config = self.sampler.vae, self.sampler.bagel.config
        factor, device = config.vae_downsample, next(vae.parameters()).device
        draw = self._noise((1, config.latent_channels, image.height // factor, image.width // factor))
        return vae.encode(to_tensor(image)[None].to(device), draw.to(device))[0].cpu()

    def _keep_pass(
        self,
        branches: _RecordedBranches,
        latent: int,
        t: Any,
        made: list[DecodedText | NoisedLatent],
        dropped: list[NoisedLatent],
    ) -> None:
        """The passes of one step: those that the sampler makes for the guidance branches."""
        flow, time = self.job.flow, float(t)
        made.append(NoisedLatent(after=len(branches.trunk), latent=latent, time=time))
        guided = flow.guides(t) and flow.cfg_text_scale > 1
        if guided and branches.text_after != len(branches.trunk):
            made.append(NoisedLatent(after=branches.text_after, latent=latent, time=time))
        if guided and flow.cfg_img_scale > 1 and not branches.image_equals_cond:
            dropped.append(NoisedLatent(after=len(branches.image_trunk), latent=latent, time=time))


class _KeptSteps(Listener):
    """x and t of the chosen steps."""

    def __init__(self, chosen: Sequence[int]) -> None:
        self._chosen, self.inputs = set(chosen), list[tuple[Tensor, Tensor]]()

    def after_step(self, step: Step) -> Step:
        if step.index in self._chosen:
            self.inputs.append((step.x, step.t))
        return step


class _RecordedBranches(Branches):
    """Branches of one sample that note what each context reads; with given pictures they only note it."""

    def __init__(self, recorder: _InputRecorder) -> None:
        self._recorder = recorder
        self.trunk: list[TextPass | ImagePass | CleanLatent] = []
        self.image_trunk: list[TextPass | ImagePass | CleanLatent] = []
        self.text_after = 0  # events of the trunk that the text-dropped branch reads
        super().__init__(recorder.sampler)

    def add_text(self, texts: Sequence[str]) -> None:
        self.text_after = len(self.trunk)
        super().add_text(texts)

    def add_image(self, images: Sequence[Image.Image], noises: Sequence[Noise] | None) -> None:
        super().add_image(images, noises)
        self.text_after = len(self.trunk)

    def prefill(
        self,
        kind: Literal["text", "latent", "vit"],
        content: Sequence[Any],
        branch: Literal["cond", "image_dropped"] = "cond",
    ) -> None:
        event: TextPass | ImagePass | CleanLatent
        if kind == "text":
            event = TextPass(ids=tuple(content[0]))
        else:
            event = (self._recorder.add_clean if kind == "latent" else self._recorder.add_picture)(content[0])
        (self.trunk if branch == "cond" else self.image_trunk).append(event)
        if self._recorder.given is None:
            super().prefill(kind, content, branch)

    def _split_off_image_dropped(self) -> None:
        if self._image_dropped is None:
            self.image_trunk = list(self.trunk)
        super()._split_off_image_dropped()
