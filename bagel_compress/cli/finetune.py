"""The verb `finetune`: trains a model further, all of it or adapters over a base that may be compressed."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, add_verb, emit, say
from bagel_compress.cli.build import add_calibration

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bagel_compress.finetune.config import FinetuneConfig
    from bagel_compress.finetune.loop import StepResult
    from bagel_compress.finetune.processes import Processes

REPORT_SECONDS = 10.0


def register(verbs: Any) -> None:
    """Adds the parser of finetune."""
    parser = add_verb(
        verbs, "finetune", "train a checkpoint further, or LoRA adapters over a checkpoint or a compressed build",
        "bagel-compress finetune lora.yaml --out out/lora --device cuda\n"
        "  torchrun --nproc-per-node 8 -m bagel_compress finetune full.yaml --out out/full --device cuda\n"
        "  bagel-compress finetune repair.yaml --out out/repair --recover BAGEL-7B-MoT"
        " --calibration bagel.calibration.safetensors",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="YAML file: model, data, what is trained (docs/finetune.md)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for saves and metrics; the same command goes on"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda (one GPU per process under torchrun), cuda:1")
    repair = parser.add_argument_group("repair of a compressed build: no data, a low-rank lora")
    repair.add_argument(
        "--recover", metavar="SRC", help="teach the adapters to give what this full-precision source of the build gives"
    )
    add_calibration(repair)
    add_json(parser)
    parser.set_defaults(verb=_finetune)


def _finetune(args: argparse.Namespace) -> int:
    from bagel_compress.finetune import saves
    from bagel_compress.finetune.config import FinetuneConfig
    from bagel_compress.finetune.loop import Trainer
    from bagel_compress.finetune.recover import open_repair
    from bagel_compress.finetune.trainee import open_trainee

    config = _with_repair(FinetuneConfig.load(args.config), args)
    processes = _processes(args.device)
    try:
        trainee, lessons = (
            open_repair(config, processes) if config.recover is not None else (open_trainee(config, processes), [])
        )
        trainer = Trainer(trainee, config, args.out, processes, lessons)
        if trainer.step and processes.first:
            say(f"going on after step {trainer.step}")
        last = _report(trainer.steps(), processes.first)
        folder = args.out / f"{config.steps:07d}"
        if processes.first:
            data = {"out": str(args.out), "folder": str(folder), "step": config.steps, "last": last}
            if lost := round(last.get("damaged_rows", 0)):
                say(f"{lost} rows were skipped; {args.out / saves.DAMAGE_FILE} names them.")
            emit(args, data, f"{folder} is complete.")
    finally:
        processes.close()
    return 0


def _with_repair(config: FinetuneConfig, args: argparse.Namespace) -> FinetuneConfig:
    """The config with --recover and --calibration in it."""
    from bagel_compress.errors import FinetuneError
    from bagel_compress.finetune.config import RecoverConfig

    if args.recover is None and args.calibration is None:
        return config
    reference = args.recover or (config.recover.reference if config.recover else None)
    if reference is None:
        raise FinetuneError("--calibration goes with --recover SRC; training on data takes no calibration set.")
    return config.with_recover(RecoverConfig(reference=reference, calibration=args.calibration))


def _processes(device: str) -> Processes:
    from bagel_compress.budgets.device_option import one_device
    from bagel_compress.finetune.processes import Processes

    if "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ:  # torchrun started this process
        return Processes.from_torchrun(device.partition(":")[0], int(os.environ["LOCAL_RANK"]))
    import torch

    return Processes(device=torch.device(one_device(device)))


def _report(steps: Iterable[StepResult], speak: bool) -> dict[str, float]:
    """A line every few seconds; returns the metrics of the last step."""
    last: dict[str, float] = {}
    said, begun, first = 0.0, time.monotonic(), 0
    for result in steps:
        last, now = result.metrics, time.monotonic()
        first = first or result.step
        if speak and (now - said > REPORT_SECONDS or result.step == result.steps):
            said = now
            pace = (now - begun) / (result.step - first + 1)
            left = (result.steps - result.step) * pace / 60
            say(
                f"{result.step}/{result.steps}  loss {last['loss']:.4f}  ce {last['ce']:.4f}  mse {last['mse']:.4f}"
                f"  {pace:.2f} s/step  {left:.0f} min left"
            )
    return last
