"""Training the small FLUX autoencoder: a stream of scenes, a loss that looks at the things, and noise on the latent.

The posterior's variance is not learnt: the log-variance rows of `encoder.conv_out` are zero with a constant bias. In
its place uniform noise levels are added to the latent while training. The decoder so learns to draw clean outlines from
an imperfect latent, which is what the flow gives it. Instead of a KL term, each latent channel is pulled to mean 0 and
variance 1 after the official scale and shift, so that the constants need no change. Objects and their rims weigh more
than the plain background: by PSNR alone a discs-for-squares autoencoder looks good.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bagel.nano.scenes import SIDE, Scene, coverage, render, sample_scene
from bagel.vae import AutoEncoder, VAEConfig
from bagel_compress.nano_training.optim import Average, Optimizer, Schedule

CONFIG = VAEConfig(ch=64, ch_mult=(1, 1, 1), num_res_blocks=1)
POSTERIOR_SIGMA = 0.03  # of the scaled latent: encoding is sampled upstream, so it is sampled here, a little
LATENT_NOISE = 0.35  # largest noise level added while training, of a latent of variance 1
OBJECT_WEIGHT = 6.0
MOMENT_WEIGHT = 0.05


@dataclass(frozen=True, slots=True)
class VAERecipe:
    """What determines the trained autoencoder, given machine and thread count."""

    steps: int = 2200
    batch: int = 8
    lr: float = 2e-3
    seed: int = 1
    average: float = 0.995


def build(seed: int) -> AutoEncoder:
    """An autoencoder with fresh weights."""
    torch.manual_seed(seed)
    model = AutoEncoder(CONFIG)
    with torch.no_grad():
        out = model.encoder.conv_out
        out.weight[CONFIG.z_channels :] = 0
        _bias(out)[CONFIG.z_channels :] = 2 * math.log(POSTERIOR_SIGMA / CONFIG.scale_factor)
        out.weight[: CONFIG.z_channels] *= 1 / CONFIG.scale_factor
    return model


class VAETrainer:
    """The state of a training run: model, optimiser, average and step; `steps()` advances it."""

    def __init__(self, recipe: VAERecipe) -> None:
        self.recipe = recipe
        self.model = build(recipe.seed)
        self.step = 0
        named = dict(self.model.named_parameters())
        inner = {n for n, p in named.items() if p.ndim == 4 and min(p.shape[:2]) > 3}
        self.optimizer = Optimizer(named, inner, recipe.lr)
        self.average = Average(named, recipe.average)
        self._schedule = Schedule(recipe.steps)

    def steps(self) -> Iterator[dict[str, float]]:
        """Trains to the end of the recipe, yielding the losses after every step."""
        while self.step < self.recipe.steps:
            rng = np.random.default_rng((self.recipe.seed, self.step))
            scenes = [sample_scene(rng) for _ in range(self.recipe.batch)]
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
            loss, metrics = self._loss(scenes, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            self._freeze_variance()
            self.optimizer.step(self._schedule(self.step))
            self.average.update(self.step)
            self.step += 1
            yield metrics

    def averaged(self) -> AutoEncoder:
        """A copy of the model with the averaged weights."""
        model = AutoEncoder(CONFIG)
        model.load_state_dict(self.average.values)
        return model.eval()

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as flat tensors."""
        return {
            "step": torch.tensor(self.step),
            **{f"model.{n}": p.detach() for n, p in self.model.named_parameters()},
            **{f"average.{n}": t for n, t in self.average.values.items()},
            **{f"optimizer.{n}": t for n, t in self.optimizer.state().items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave."""
        self.step = int(state["step"])
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                p.copy_(state[f"model.{n}"])
        for n, t in self.average.values.items():
            t.copy_(state[f"average.{n}"])
        self.optimizer.load({n.removeprefix("optimizer."): t for n, t in state.items() if n.startswith("optimizer.")})

    def _loss(self, scenes: list[Scene], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        image = to_tensor(np.stack([render(s) for s in scenes]))
        weight = torch.from_numpy(np.stack([_weights(s) for s in scenes]))[:, None]
        mean, _ = self.model.moments(image)
        latent = CONFIG.scale_factor * (mean - CONFIG.shift_factor)
        level = torch.rand(len(scenes), 1, 1, 1, generator=generator) * LATENT_NOISE
        noisy = latent + level * torch.randn(latent.shape, generator=generator)
        error = self.model.decode(noisy) - image
        loss = (weight * (error.square() + 0.2 * error.abs())).mean() / weight.mean()
        moments = latent.mean((0, 2, 3)).square().mean() + (latent.std((0, 2, 3)) - 1).square().mean()
        mse = float(error.detach().square().mean())
        metrics = {"loss": float(loss.detach()), "psnr": 10 * math.log10(4 / mse), "moments": float(moments.detach())}
        return loss + MOMENT_WEIGHT * moments, metrics

    def _freeze_variance(self) -> None:
        out = self.model.encoder.conv_out
        for p in (out.weight, _bias(out)):
            if p.grad is not None:
                p.grad[CONFIG.z_channels :] = 0


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1]."""
    return ((torch.from_numpy(images).float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()


def _weights(scene: Scene) -> np.ndarray:
    """OBJECT_WEIGHT on things and 1.5 pixels around them, 1 elsewhere: float32 [SIDE, SIDE]."""
    weight = np.ones((SIDE, SIDE), np.float32)
    for thing in scene.things:
        weight[coverage(thing.shape, thing.x, thing.y, thing.radius + 1.5) > 0] = OBJECT_WEIGHT
    return weight


def reconstruct(model: AutoEncoder, images: np.ndarray, seed: int) -> Tensor:
    """Encode (sampled) and decode: uint8 [B, H, W, 3] -> [B, 3, H, W], not clamped."""
    with torch.no_grad():
        mean, logvar = model.moments(to_tensor(images))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        z = mean + torch.exp(0.5 * logvar) * noise
        return model.decode(CONFIG.scale_factor * (z - CONFIG.shift_factor))
