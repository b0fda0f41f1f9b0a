"""Training the model in phases: the ViT sees, the und expert answers, drawing is learnt, then all tasks together.

    vit    the ViT alone, taught patch by patch (vit_train.py)
    und    describe and answer: needs no latents and no generation expert, so a step costs little
    draw   all tasks, most of the work on drawing, which is learnt first
    mix    all tasks, most of the work on answers and edits
    polish the same with more edits, at a falling rate
    bind   the same with more of what was learnt last, which word belongs to which thing: one of two things is removed,
           a plan repeats colours and shapes as they were paired. The moving average of the weights is what is kept

`ModelTrainer` is a loop that yields: whoever runs it prints, saves and stops. It is deterministic on one machine and
thread count, and its state, plain tensors, lets it go on exactly where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bagel.model import Bagel
from bagel.text import TextCodec
from bagel_compress.nano_training import vit_train
from bagel_compress.nano_training.batches import Mix, Pool, Tasks
from bagel_compress.nano_training.forward import WeightedLosses, forward, grouped
from bagel_compress.nano_training.model import CONFIG, LATENT_TOKENS, build, inner_matrices, trained
from bagel_compress.nano_training.optim import Average, Optimizer, Schedule

PHASES = ("vit", "und", "draw", "mix", "polish", "bind")
UNDERSTANDING = PHASES[:2]  # phases that need no latents


@dataclass(frozen=True, slots=True)
class TrainingPhase:
    """Length, learning rate and its schedule, and how the losses weigh. `vit_rate`: the ViT's share of the rate.

    The ViT is frozen after its lessons: Muon gives a matrix a full-size update however faint its gradient is, and what
    no loss asks for yet (shapes, before the decoder can bind them) is washed out within a hundred steps.
    """

    steps: int
    lr: float
    warmup: int
    decay: float
    floor: float
    ce_weight: float = 1.0
    vit_rate: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """What determines the trained weights, given the latents, the machine and the thread count."""

    vit: TrainingPhase = TrainingPhase(1600, 2e-3, 50, 0.5, 0.05, vit_rate=1.0)
    und: TrainingPhase = TrainingPhase(160, 2e-3, 50, 0.0, 1.0)
    draw: TrainingPhase = TrainingPhase(630, 2e-3, 60, 0.0, 1.0, ce_weight=0.3)
    mix: TrainingPhase = TrainingPhase(600, 2e-3, 30, 0.0, 1.0)
    polish: TrainingPhase = TrainingPhase(800, 2e-3, 20, 0.85, 0.02)
    bind: TrainingPhase = TrainingPhase(600, 2e-3, 20, 0.85, 0.02)
    vit_batch: int = 32
    und_batch: Mix = field(default_factory=lambda: Mix(ask=24))
    draw_batch: Mix = field(default_factory=lambda: Mix(24, 8, 10, 3))
    mix_batch: Mix = field(default_factory=lambda: Mix(10, 14, 16, 4, edit_copies=3, questions=4))
    polish_batch: Mix = field(default_factory=lambda: Mix(6, 14, 22, 4, edit_copies=3, questions=4))
    bind_batch: Mix = field(default_factory=lambda: Mix(6, 8, 20, 10, edit_copies=3))
    average: float = 0.998
    seed: int = 1


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """Where a run is: the step just done, of the phase's steps, and what it measured."""

    phase: str
    step: int
    steps: int
    metrics: Mapping[str, float]


class ModelTrainer:
    """The state of a run: weights, the current phase with its optimiser, and the average."""

    def __init__(self, recipe: ModelRecipe, text: TextCodec) -> None:
        self.recipe = recipe
        self.model = build(recipe.seed)
        self.head = vit_train.heads(recipe.seed + 1)
        self._text = text
        self._enter("vit")

    def steps(self, phase: str, pool: Pool | None = None) -> Iterator[TrainingProgress]:
        """Trains to the end of a phase, from wherever the run is in it. Phases come in the order of PHASES."""
        if phase != self.phase:
            self._enter(phase)
        plan: TrainingPhase = getattr(self.recipe, phase)
        schedule = Schedule(plan.steps, plan.warmup, plan.decay, plan.floor)
        tasks = Tasks(self._text, pool, self._batch(), self.recipe.seed)
        while self.step < plan.steps:
            loss, metrics = self._vit_loss() if phase == "vit" else self._loss(tasks)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = self.optimizer.step(schedule(self.step))
            if pool is not None:
                self.average.update(self.step)
            self.step += 1
            yield TrainingProgress(phase, self.step, plan.steps, {**metrics, "norm": norm})

    def averaged(self) -> Bagel:
        """A copy of the model with the averaged weights."""
        model = Bagel(CONFIG)
        model.load_state_dict({**self.model.state_dict(), **self.average.values})
        return model.eval()

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as flat tensors."""
        return {
            "phase": torch.tensor(PHASES.index(self.phase)),
            "step": torch.tensor(self.step),
            **{f"model.{n}": p.detach() for n, p in self._named().items()},
            **{f"average.{n}": t for n, t in self.average.values.items()},
            **{f"optimizer.{n}": t for n, t in self.optimizer.state().items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave."""
        self._enter(PHASES[int(state["phase"])])
        self.step = int(state["step"])
        with torch.no_grad():
            for n, p in self._named().items():
                p.copy_(state[f"model.{n}"])
        for n, t in self.average.values.items():
            t.copy_(state[f"average.{n}"])
        self.optimizer.load({n.removeprefix("optimizer."): t for n, t in state.items() if n.startswith("optimizer.")})

    def _enter(self, phase: str) -> None:
        """Fresh optimiser and average; the weights go on."""
        self.phase, self.step = phase, 0
        plan: TrainingPhase = getattr(self.recipe, phase)
        named = self._named()
        if phase == "vit":
            named = {n: p for n, p in named.items() if n.startswith(("vit.", "head."))}
        matrices = inner_matrices(self.model) & named.keys()
        self.model.vit.requires_grad_(plan.vit_rate > 0)
        rates = {n: plan.vit_rate for n in named if n.startswith("vit.")}
        self.optimizer = Optimizer(named, matrices, plan.lr, rates)
        self.average = Average(trained(self.model), self.recipe.average)

    def _batch(self) -> Mix:
        return self.recipe.und_batch if self.phase in UNDERSTANDING else getattr(self.recipe, f"{self.phase}_batch")

    def _named(self) -> dict[str, Tensor]:
        return {**trained(self.model), **{f"head.{n}": p for n, p in self.head.named_parameters()}}

    def _vit_loss(self) -> tuple[Tensor, Mapping[str, float]]:
        rng = np.random.default_rng((self.recipe.seed, 3, self.step))
        loss, accuracy = vit_train.loss(self.model, self.head, rng, self.recipe.vit_batch)
        return loss, {"loss": float(loss.detach()), **accuracy}

    def _loss(self, tasks: Tasks) -> tuple[Tensor, Mapping[str, float]]:
        groups = grouped(self._text, tasks.samples(self.step), LATENT_TOKENS, CONFIG.latent_width)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        noise = [torch.randn(g.latents.shape, generator=generator) for g in groups]
        losses: WeightedLosses = forward(self.model, groups, noise)
        ce = (losses.ce * losses.ce_weights).sum() / losses.ce_weights.sum()
        answers = losses.ce_weights == 1.0
        metrics = {"ce": float(ce.detach()), "answers": float(losses.ce.detach()[answers].mean())}
        if not len(losses.mse):
            return ce, metrics
        mse = losses.mse.mean()
        plan: TrainingPhase = getattr(self.recipe, self.phase)
        return mse + plan.ce_weight * ce, {**metrics, "mse": float(mse.detach())}
