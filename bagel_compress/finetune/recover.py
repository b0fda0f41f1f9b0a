"""Repair: adapters over a compressed build that make it give what its full-precision model gives (distillation).

The lessons are a calibration set: recorded latents at recorded times, and decoded texts, each after what its context
had read. For every noised token the velocity of the reference is wanted, for every decoded token its distribution of
the next one. The reference is opened first, its answers are kept on the CPU, and it is gone before the build is opened:
a device holds one model at a time. (Kept: 2 bytes per value; a decoded token of BAGEL-7B-MoT has 152,064.)

    mse = mean over noised tokens of (velocity - wanted)^2, as a share of the set's mean wanted^2
    ce  = mean over decoded tokens of KL(reference || build)

The result is for this build alone: it makes up for its rounding and is run beside it (`bc.open_model(build,
adapter=...)`). It cannot be merged, because the sum has no place in the build's codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from bagel.model import Bagel
from bagel.sampler import Sampler
from bagel.training import Item, LatentItem, Losses, PackedBatch, TokenItem, ViTItem, forward, pack
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.calibrate.calibration_set import (
    CalibrationSet,
    CleanLatent,
    DecodedText,
    ImagePass,
    Inputs,
    NoisedLatent,
    RecordedSequence,
    TextPass,
    codec_fingerprint,
)
from bagel_compress.calibrate.fitting import packaged_set
from bagel_compress.errors import FinetuneError
from bagel_compress.finetune.config import FinetuneConfig
from bagel_compress.finetune.packing import Prepared
from bagel_compress.finetune.processes import Processes
from bagel_compress.finetune.trainee import Trainee, open_trainee
from bagel_compress.run.load import downloaded, load_checkpoint
from bagel_compress.source.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Lesson(Prepared):
    """A packed batch with what the reference gives: velocity [N, p*p*z] and logits [rows, vocabulary], both bf16."""

    velocity: Tensor
    logits: Tensor
    power: float  # mean square of all wanted velocities of the set

    def inputs(self, device: torch.device) -> tuple[Any, ...]:
        return self.batch.to(device), self.velocity.to(device), self.logits.to(device), self.power


class RepairNetwork(nn.Module):
    """The training forward of a build whose losses are distances to the reference."""

    def __init__(self, bagel: Bagel, recompute: bool) -> None:
        super().__init__()
        self.bagel, self.recompute = bagel, recompute

    def forward(self, batch: PackedBatch, velocity: Tensor, logits: Tensor, power: float) -> Losses:
        own_velocity, own_logits, hidden = answers(self.bagel, batch, self.recompute)
        wanted = logits.float().log_softmax(-1)
        ce = kl_div(own_logits.float().log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
        return Losses(ce, (own_velocity.float() - velocity.float()) ** 2 / power, hidden)


class Lessons:
    """The lessons of one of `count` parallel streams: each epoch in another order, the n-th draw always the same."""

    def __init__(self, lessons: Sequence[Lesson], seed: int, number: int, count: int) -> None:
        self._lessons, self._seed, self._number, self._count = lessons, seed, number, count
        self._taken = 0

    def next(self) -> Lesson:
        epoch, place = divmod(self._taken * self._count + self._number, len(self._lessons))
        self._taken += 1
        return self._lessons[int(np.random.default_rng((self._seed, epoch)).permutation(len(self._lessons))[place])]

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load(self, state: dict[str, Any]) -> None:
        self._taken = int(state["taken"])


def open_repair(config: FinetuneConfig, processes: Processes) -> tuple[Trainee, list[Lesson]]:
    """The build with its adapters, and the lessons.

    Raises FinetuneError if the build was not made of the reference, CalibrationError if the set is of another model.
    """
    assert config.recover is not None
    reference = Checkpoint.open(_folder(config.recover.reference), config.base)
    _expect_source(config, reference)
    sampler = load_checkpoint(reference, processes.device, getattr(torch, config.dtype))
    calibration = _calibration(config, reference)
    calibration.expect_model(Inputs.of(reference.shapes), codec_fingerprint(sampler.text), reference.name)
    lessons = lessons_of(calibration, sampler, config.tokens)
    del sampler
    trainee = open_trainee(config, processes)
    return replace(trainee, network=RepairNetwork(_unshifted(trainee.bagel), config.recompute)), lessons


def lessons_of(calibration: CalibrationSet, sampler: Sampler, tokens: int) -> list[Lesson]:
    """The set as packed batches of at most `tokens` tokens, with the answers of the reference in `sampler`.

    Raises FinetuneError on a sequence that is longer.
    """
    bagel, batches, taken, total = _unshifted(sampler.bagel), list[PackedBatch](), list[list[Item]](), 0
    for name, items in _samples(calibration, bagel, tokens):
        length = sum(_length(item, bagel) for item in items)
        if length > tokens:
            raise FinetuneError(
                f"sequence {name} of {calibration.path} is {length} tokens long, a packed batch holds {tokens}; raise"
                " tokens."
            )
        if total + length > tokens:
            batches.append(pack(bagel, sampler.text, taken))
            taken, total = [], 0
        taken.append(items)
        total += length
    batches.append(pack(bagel, sampler.text, taken))
    wanted = []
    with torch.no_grad():
        for batch in batches:
            velocity, logits, _ = answers(bagel, batch.to(bagel.device), False)
            wanted.append((velocity.to("cpu", torch.bfloat16), logits.to("cpu", torch.bfloat16)))
    power = float(torch.cat([velocity.float().flatten() for velocity, _ in wanted]).square().mean())
    return [
        Lesson(batch, batch.latents, len(batch.sample_lens), *given, power)
        for batch, given in zip(batches, wanted, strict=True)
    ]


def answers(bagel: Bagel, batch: PackedBatch, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Velocities of the noised rows [N, p*p*z], logits of the decoded ones [rows, vocabulary], and all hidden rows."""
    hidden = forward(bagel, batch, batch.latents, recompute).hidden  # what is noised already is noised by itself
    return bagel.llm2vae(hidden[batch.mse_rows]), bagel.lm_head(hidden[batch.ce_rows]), hidden


# --- a set as samples -------------------------------------------------------------------------------------------------


def _samples(calibration: CalibrationSet, bagel: Bagel, tokens: int) -> list[tuple[str, list[Item]]]:
    """A context with as many of its noised pictures as fit (they do not see each other), or with one decoded text."""
    found = []
    for sequence in calibration.header.sequences:
        for after in sorted({branch.after for branch in sequence.branches}):
            trunk = [_item(event, calibration, bagel) for event in sequence.trunk[:after]]
            for part in _parts(sequence, after, calibration, tokens - sum(_length(item, bagel) for item in trunk)):
                found.append((sequence.name, [*trunk, *(_item(branch, calibration, bagel) for branch in part)]))
    return found


def _parts(
    sequence: RecordedSequence, after: int, calibration: CalibrationSet, room: int
) -> list[list[NoisedLatent | DecodedText]]:
    parts: list[list[NoisedLatent | DecodedText]] = []
    left = 0
    for branch in sequence.branches:
        if branch.after != after:
            continue
        length = sum(calibration.rows_of(branch))
        if isinstance(branch, DecodedText) or length > left:
            parts.append([])
            left = 0 if isinstance(branch, DecodedText) else room
        parts[-1].append(branch)
        left -= length
    return parts


def _item(event: Any, calibration: CalibrationSet, bagel: Bagel) -> Item:
    if isinstance(event, TextPass | DecodedText):
        return TokenItem(event.ids, loss=isinstance(event, DecodedText))
    if isinstance(event, ImagePass):
        return ViTItem((calibration.picture(event.picture).permute(2, 0, 1).float() / 255 - 0.5) / 0.5)
    assert isinstance(event, CleanLatent | NoisedLatent)
    rows, cols, width = calibration.shapes[f"latent/{event.latent}"]
    latent = bagel.unpack_latent(calibration.latent(event.latent).float().reshape(-1, width), rows, cols)
    if isinstance(event, CleanLatent):
        return LatentItem(latent)
    return LatentItem(latent, float(torch.tensor(event.time, dtype=torch.float64).logit()))


def _length(item: Item, bagel: Bagel) -> int:
    if isinstance(item, TokenItem):
        return len(item.ids)
    assert isinstance(item, ViTItem | LatentItem)
    picture, cell = (
        (item.image, bagel.config.vit.patch_size)
        if isinstance(item, ViTItem)
        else (item.latent, bagel.config.latent_patch_size)
    )
    return 2 + (picture.shape[1] // cell) * (picture.shape[2] // cell)


# --- what belongs together --------------------------------------------------------------------------------------------


def _unshifted(bagel: Bagel) -> Bagel:
    """Times of a set are those that the model saw, so they are not shifted once more."""
    bagel.config = replace(bagel.config, timestep_shift=1.0)
    return bagel


def _folder(name: str) -> Path:
    return Path(name) if Path(name).exists() else downloaded(name)


def _expect_source(config: FinetuneConfig, reference: Checkpoint) -> None:
    folder = _folder(config.model)
    if not (folder / MANIFEST).exists():
        raise FinetuneError(f"{config.model} is no compressed artifact, so there is nothing to repair; give a build.")
    source = Artifact.open(folder).manifest.source
    if source.digest != reference.digest:
        raise FinetuneError(
            f"{config.model} was made of {source.name} ({source.digest[:12]}), the reference is {reference.name}"
            f" ({reference.digest[:12]}); give the checkpoint that it was made of."
        )


def _calibration(config: FinetuneConfig, reference: Checkpoint) -> CalibrationSet:
    assert config.recover is not None
    if config.recover.calibration is not None:
        return CalibrationSet.open(config.recover.calibration)
    found = packaged_set(reference.shapes, reference.files)
    if found is None:
        raise FinetuneError(
            f"no calibration set comes with the package for {reference.name}; make one with `bagel-compress calibrate"
            " --source SRC --out bagel.calibration.safetensors` and name it with --calibration."
        )
    return found
