"""The training loop: packed batches, losses, AdamW, moving average, saves; it goes on after a kill.

Loss = ce_weight * mean CE over all predicted tokens of the step + mse_weight * mean over all noised tokens of the mean
squared error of their channels (official). Means are over the whole step: all packed batches of all processes, so
that N processes with one batch each give the loss of one process with N.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bagel_compress.errors import FinetuneError
from bagel_compress.finetune import saves
from bagel_compress.finetune.config import FinetuneConfig
from bagel_compress.finetune.lora import save_adapter
from bagel_compress.finetune.packing import Packer, Prepared
from bagel_compress.finetune.processes import Processes, whole
from bagel_compress.finetune.readers import open_reader
from bagel_compress.finetune.recover import Lesson, Lessons
from bagel_compress.finetune.stream import Damage, ExampleStream
from bagel_compress.finetune.trainee import Trainee
from bagel_compress.io.atomic import write_atomic


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step that was done. `metrics` is its line of metrics.jsonl."""

    step: int
    steps: int
    metrics: dict[str, float]


class AveragedAdamW:
    """AdamW with warm-up and schedule, and the moving average of what is trained. State: plain tensors by name."""

    def __init__(self, trained: dict[str, nn.Parameter], config: FinetuneConfig) -> None:
        self.trained, self.config = trained, config
        self._adam = torch.optim.AdamW(
            trained.values(), config.lr, config.betas, config.eps, config.weight_decay, foreach=True
        )
        for parameter in trained.values():
            self._adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        decay = config.decay
        self.ema = {n: p.detach().clone() for n, p in trained.items()} if decay is not None else {}

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        rise = min(1.0, (step + 1) / self.config.warmup) if self.config.warmup else 1.0
        if self.config.schedule == "constant":
            return self.config.lr * rise
        done = max(0.0, step - self.config.warmup) / max(1, self.config.steps - self.config.warmup)
        return self.config.lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    @torch.no_grad()
    def step(self, step: int) -> tuple[float, float]:
        """One update; drops the gradients. Returns their norm before clipping, and the rate.

        A missing gradient (of adapters whose expert had no rows) is zero, so that all have made the same updates.
        """
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = whole(nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip))
        rate = self.rate(step)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad()
        for name, average in self.ema.items():
            average.lerp_(self.trained[name].detach(), 1 - float(self.config.decay or 0))
        return float(norm), rate

    def state(self) -> dict[str, Tensor]:
        state = {f"weight.{n}": p.detach() for n, p in self.trained.items()}
        state |= {f"ema.{n}": t for n, t in self.ema.items()}
        for key in ("exp_avg", "exp_avg_sq"):
            state |= {f"{key}.{n}": self._adam.state[p][key] for n, p in self.trained.items()}
        return state

    def resume(self, step: int) -> None:
        """After the tensors of `state` got their values: `step` updates were made."""
        for parameter in self.trained.values():
            self._adam.state[parameter]["step"].fill_(step)


class Trainer:
    """A run: `steps` yields after every step; whoever runs it prints and stops."""

    def __init__(
        self,
        trainee: Trainee,
        config: FinetuneConfig,
        out: Path,
        processes: Processes | None = None,
        lessons: Sequence[Lesson] = (),
    ) -> None:
        """Opens the data, unless it is given as `lessons`, and goes to where an earlier run in `out` stopped.

        Raises FinetuneError if `out` holds a run with another config, or if the data cannot be used.
        """
        if not config.data and not lessons:
            raise FinetuneError("the config has no data groups; add one under data.")
        self.trainee, self.config, self.out = trainee, config, out
        self.processes = processes or Processes()
        self.optimizer = AveragedAdamW(trainee.trained, config)
        readers = [open_reader(group) for group in config.data]
        self.damage = [Damage(r.group.name, r.rows) for r in readers]
        count = self.processes.world * config.accumulate
        numbers = range(self.processes.rank * config.accumulate, (self.processes.rank + 1) * config.accumulate)
        self.packers: list[Packer | Lessons] = [
            Lessons(lessons, config.seed, number, count)
            if lessons
            else Packer(
                trainee.sampler, config, ExampleStream(readers, config.seed, number, count, self.damage), self.damage
            )
            for number in numbers
        ]
        self.step = 0
        self._begin(count)

    def steps(self) -> Iterator[StepResult]:
        """Trains to the end, from wherever the run is, and saves on the way. Raises FinetuneError on a loss of NaN."""
        metrics = saves.Metrics(self.out, self.step, self.config.tensorboard) if self.processes.first else None
        try:
            while self.step < self.config.steps:
                with self.trainee.sampler.running():
                    values = self._step()
                if metrics is not None:
                    metrics.add(values)
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    self.save()
                yield StepResult(self.step, self.config.steps, values)
        finally:
            if metrics is not None:
                metrics.close()

    def save(self) -> Path:
        """Writes the save of the current step and returns its folder."""
        folder = saves.folder_of(self.out, self.step)
        if self.processes.first:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / saves.STATE_FILE).unlink(missing_ok=True)
        self._save_weights(folder)
        saves.save_state(folder, self.optimizer.state(), self.processes)
        positions = self._gathered([packer.state() for packer in self.packers])
        damage = self._gathered([found.found for found in self.damage])
        if self.processes.first:
            self._write_damage(damage)
            state = {"step": self.step, "streams": [s for part in positions for s in part], "damage": damage}
            write_atomic(folder / saves.STATE_FILE, json.dumps(state) + "\n")
            saves.drop_old_states(self.out, self.config.keep_states)
        self.processes.wait()
        return folder

    # --- one step -----------------------------------------------------------------------------------------------------

    def _step(self) -> dict[str, float]:
        start = time.monotonic()
        batches = [packer.next() for packer in self.packers]
        tokens, samples, n_ce, n_mse = self.processes.total(_counts(batches))
        ce = mse = 0.0
        for prepared in batches:
            losses = self.trainee.network(*prepared.inputs(self.processes.device))
            ce_part = losses.ce.sum() / max(1.0, n_ce)
            mse_part = losses.mse.mean(-1).sum() / max(1.0, n_mse)
            loss = self.config.ce_weight * ce_part + self.config.mse_weight * mse_part
            (loss * self.processes.world).backward()  # gradients are averaged over the processes
            ce, mse = ce + float(ce_part.detach()), mse + float(mse_part.detach())
        if self.trainee.adapters:
            self.processes.average_gradients(self.trainee.trained.values())
        ce, mse, damaged = self.processes.total([ce, mse, float(sum(len(d.found) for d in self.damage))])
        loss_value = self.config.ce_weight * ce + self.config.mse_weight * mse
        if not math.isfinite(loss_value):
            raise FinetuneError(f"the loss of step {self.step + 1} is {loss_value}; lower lr or raise warmup.")
        norm, rate = self.optimizer.step(self.step)
        self.step += 1
        return {
            "step": self.step, "loss": loss_value, "ce": ce, "mse": mse, "norm": norm, "lr": rate, "tokens": tokens,
            "samples": samples, "damaged_rows": damaged, "seconds": round(time.monotonic() - start, 3),
        }  # fmt: skip

    # --- saves --------------------------------------------------------------------------------------------------------

    def _begin(self, streams: int) -> None:
        """Writes the config of a new run, or goes on with an old one."""
        path = self.out / saves.CONFIG_FILE
        mine = self.config.model_dump(mode="json") | {"streams": streams}
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            changed = self.config.changed({k: v for k, v in stored.items() if k != "streams"})
            changed += ["processes times accumulate"] if stored.get("streams") != streams else []
            if changed:
                raise FinetuneError(
                    f"{self.out} holds a run with another {', '.join(changed)}; give another --out, or the same config."
                )
        self.processes.wait()
        if self.processes.first:
            write_atomic(path, json.dumps(mine, indent=2) + "\n")
        folder = saves.newest(self.out)
        if folder is None:
            return
        state = saves.read_state(folder)
        saves.load_state(folder, self.optimizer.state(), self.processes)
        self.step = int(state["step"])
        self.optimizer.resume(self.step)
        first = self.processes.rank * len(self.packers)
        for packer, position in zip(self.packers, state["streams"][first:], strict=False):
            packer.load(position)
        for found, rows in zip(self.damage, state["damage"][self.processes.rank], strict=True):
            found.found = dict(rows)

    def _save_weights(self, folder: Path) -> None:
        lora, trainee = self.config.lora, self.trainee
        if lora is not None:
            if self.processes.first:
                save_adapter(folder, trainee.trained, lora, trainee.base)
                if self.optimizer.ema:
                    save_adapter(folder / "ema", self.optimizer.ema, lora, trainee.base)
            return
        weights: dict[str, Tensor] = dict(trainee.weights())
        saves.save_weights(folder / "model.safetensors", weights, self.processes)
        if self.optimizer.ema:
            saves.save_weights(folder / "ema.safetensors", weights | self.optimizer.ema, self.processes)
        if self.processes.first and trainee.checkpoint is not None:
            saves.copy_beside(folder, trainee.checkpoint.files)

    def _write_damage(self, found: list[list[dict[str, str]]]) -> None:
        lines = [
            f"{self.damage[i].group}: {row}: {why}"
            for process in found
            for i, rows in enumerate(process)
            for row, why in rows.items()
        ]
        if lines:
            write_atomic(self.out / saves.DAMAGE_FILE, "\n".join(lines) + "\n")

    def _gathered(self, mine: Any) -> list[Any]:
        """What each process has, in the order of the ranks."""
        if self.processes.world == 1:
            return [mine]
        import torch.distributed as dist

        found: list[Any] = [None] * self.processes.world
        dist.all_gather_object(found, mine)
        return found


def _counts(batches: Sequence[Prepared]) -> list[float]:
    """Tokens, samples, predicted tokens and noised tokens."""
    return [
        float(sum(b.tokens for b in batches)), float(sum(b.samples for b in batches)),
        float(sum(len(b.batch.ce_rows) for b in batches)), float(sum(len(b.batch.mse_rows) for b in batches)),
    ]  # fmt: skip
