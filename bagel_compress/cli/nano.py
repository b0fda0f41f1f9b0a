"""The verb that makes BAGEL-nano again: `train-nano`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPORT_STEPS = 50


def register(verbs: Any) -> None:
    """Adds `train-nano`."""
    parser = verbs.add_parser(
        "train-nano",
        help="train BAGEL-nano from seeds on CPU (hours)",
        description="Train BAGEL-nano from its seeds: autoencoder, then understanding, then all tasks. Saves its state"
        " every three minutes; the same command goes on from there. Same machine and thread count: the same weights.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for states and the checkpoint OUT/BAGEL-nano")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; a part of what makes a run repeat exactly")
    parser.set_defaults(verb=_train)


def _train(args: argparse.Namespace) -> int:
    import torch

    from bagel.nano.reproduce import NAME, NanoRecipe, reproduce

    torch.set_num_threads(args.threads)
    _report(reproduce(args.out, NanoRecipe()))
    print(f"{args.out / NAME} is complete.")
    return 0


def _report(steps: Iterable[Any]) -> None:
    """One line per REPORT_STEPS steps: phase, step, seconds per step, averages since the last line."""
    seen: list[Any] = []
    start = time.monotonic()
    for progress in steps:
        seen.append(progress.metrics)
        if progress.step % REPORT_STEPS == 0 or progress.step == progress.steps:
            means = {name: sum(m[name] for m in seen) / len(seen) for name in seen[-1]}
            pace = (time.monotonic() - start) / len(seen)
            text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
            print(
                f"{progress.phase:4s} {progress.step:5d}/{progress.steps}  {pace:.2f} s/step  {text}", file=sys.stderr
            )
            seen, start = [], time.monotonic()
