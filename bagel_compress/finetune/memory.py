"""Memory of a training step of adapters on one GPU, predicted without one: the real forward and backward pass over fake
tensors of the true shapes, with every storage counted.

Counted beside the step: the base as it is stored, adapters (fp32) with their AdamW moments and average, the VAE and the
CUDA context. The batch is text-to-image samples of one size, as many as fit into `tokens`. Attention is torch's on a
CPU. Not seen: what an operator allocates inside itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bagel.sampler import Sampler
from bagel.training import Item, LatentItem, TextItem, forward, pack
from bagel_compress.budgets.fake_model import BuildOutline, check_sizes, fake_model, scratch_bytes, text_of
from bagel_compress.budgets.memory_tracker import Peak, Tracker
from bagel_compress.budgets.overruns import overruns
from bagel_compress.budgets.predict import (
    ACTIVATIONS,
    CONTEXT,
    SHOWN,
    fixed_bytes,
    weight_bytes,
)  # fmt: skip
from bagel_compress.errors import FinetuneError
from bagel_compress.finetune.config import FinetuneConfig
from bagel_compress.finetune.lora import add_adapters, parameters_of
from bagel_compress.parity.report_data import BudgetReport, PhaseUse
from bagel_compress.run.target import MIB, Target

ADAPTERS = "adapters and moments"
CAPTION_TOKENS = 64  # of a sample, wrapper tokens included


def predict_finetune(build: BuildOutline, target: Target, config: FinetuneConfig) -> BudgetReport:
    """Peak memory of each phase of a step at the target's image size.

    Raises FinetuneError without `lora` (all weights are sharded over GPUs), TargetError on an impossible image size.
    """
    if config.lora is None:
        raise FinetuneError("the memory of a step is predicted for adapters on one GPU; give the config a lora.")
    check_sizes(build, target.sizes.image)
    with FakeTensorMode():
        model = fake_model(build, every_layer=True)
        weights = weight_bytes(model.sampler, {}, model.ring)
        trained = parameters_of(add_adapters(model.sampler.bagel, config.lora, 0))
        adapters = sum(p.numel() * 4 for p in trained.values())
        peaks = _run(model.sampler, list(trained.values()), target.sizes.image, config)
    fixed, scratch = fixed_bytes(build.units), scratch_bytes(build)
    held = {part: weights.get(part, 0) + fixed.get(part, 0) for part in weights.keys() | fixed.keys()}
    copies = 3 if config.decay is None else 4  # values, two moments, average
    # AdamW's update over lists of tensors (foreach): gradients, and the square roots of the second moments.
    peaks.append(Peak("update", 0, {ACTIVATIONS: 2 * adapters}))
    phases = []
    for peak in peaks:
        parts = {shown: float(sum(held.get(part, 0) for part in own)) for shown, own in SHOWN.items()}
        parts[ADAPTERS] = float(copies * adapters)
        parts[ACTIVATIONS] = float(peak.by_category.get(ACTIVATIONS, 0) + scratch)
        parts[CONTEXT] = float(target.device.context_mib * MIB)
        phases.append(PhaseUse(name=f"finetune: {peak.name}", parts=parts))
    report = BudgetReport(
        artifact=build.digest, name=build.name, target=target.name, device=target.device.name, limit=target.limit,
        phases=tuple(phases), disk=build.disk,
    )  # fmt: skip
    return report.model_copy(update={"overruns": overruns(report, None)})


def _run(
    sampler: Sampler, trained: list[torch.nn.Parameter], image: tuple[int, int], config: FinetuneConfig
) -> list[Peak]:
    model = sampler.bagel.config
    grid = math.prod(side // model.image_stride for side in image)
    samples = config.tokens // (grid + 2 + CAPTION_TOKENS)
    if not samples:
        raise FinetuneError(
            f"a picture of {image[0]} x {image[1]} takes {grid + 2 + CAPTION_TOKENS} tokens with its caption, tokens is"
            f" {config.tokens}; raise it."
        )
    tracker = Tracker(lambda tensor: ACTIVATIONS)
    tracker.hold(t for module in (sampler.bagel, sampler.vae) for t in (*module.parameters(), *module.buffers()))
    with tracker:
        tracker.enter("vae encode")
        shape = (model.latent_channels, image[0] // model.vae_downsample, image[1] // model.vae_downsample)
        with torch.no_grad():
            latent: Tensor = sampler.vae.encode(torch.zeros(1, 3, *image), torch.zeros(1, *shape))[0]
        items: list[list[Item]] = [[TextItem(text_of(CAPTION_TOKENS)), LatentItem(latent, 0.0)]] * samples
        batch = pack(sampler.bagel, sampler.text, items)
        tracker.enter("forward")
        losses = forward(sampler.bagel, batch, torch.zeros_like(batch.latents), config.recompute)
        loss = losses.mse.mean()
        tracker.enter("backward")
        loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in trained[-1:])
    return tracker.peaks
