"""The verbs score (a benchmark, by default BAGEL-nano's) and train-nano (trains BAGEL-nano from its seeds)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, emit

if TYPE_CHECKING:
    from bagel.config import BagelConfig
    from bagel_compress.scores.benchmark import Benchmark, Scores

REPORT_STEPS = 50


def register(verbs: Any) -> None:
    """Adds the parsers of score and train-nano."""
    score = verbs.add_parser(
        "score",
        help="count right pictures, answers, edits and plans of BAGEL-nano or a build of it",
        description="Runs over 500 prompts and counts right answers by kind. With --against, also prints the paired"
        " difference from another model and its 95 %% interval. On the CPU the model computes in fp32, so that the"
        " scores show the error of the compressed weights alone; on a GPU it runs as it does in use.",
        epilog="examples:\n  bagel-compress score bagel_compress/data/BAGEL-nano\n"
        "  bagel-compress score out/nf4 --against bagel_compress/data/BAGEL-nano --sheet sheet.png\n"
        "  bagel-compress score out/nf4 --against BAGEL-7B-MoT --benchmark geneval:benchmark --device cuda",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument("model", metavar="MODEL", help="BAGEL-nano, a build of it; with --benchmark any BAGEL")
    score.add_argument("--against", metavar="MODEL", help="the original to compare with, prompt by prompt")
    score.add_argument(
        "--sheet", type=Path, metavar="FILE", help="PNG file to write: the pictures, framed green if right, else red"
    )
    which = score.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a fifth of the prompts")
    which.add_argument(
        "--benchmark", metavar="MODULE:FUNCTION", help="another benchmark: a function that returns one (docs/nano.md)"
    )
    score.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    score.add_argument("--threads", type=int, default=1, help="CPU threads (default 1; more do not help BAGEL-nano)")
    add_json(score)
    score.set_defaults(verb=_score)

    parser = verbs.add_parser(
        "train-nano",
        help="train BAGEL-nano from seeds on CPU (about 40 minutes of one core)",
        description="Train BAGEL-nano from its seeds: autoencoder, then understanding, then all tasks. Saves its state"
        " every three minutes; the same command continues from there. On one machine, the same number of threads gives"
        " the same weights.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for states and the checkpoint OUT/BAGEL-nano")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; a run repeats exactly only with the same number"
    )
    parser.set_defaults(verb=_train)


def _score(args: argparse.Namespace) -> int:
    from bagel_compress.io.atomic import atomic_path
    from bagel_compress.scores.benchmark import compare
    from bagel_compress.scores.contact_sheet import contact_sheet

    benchmark = _benchmark(args)
    check = None if args.benchmark else _expect_nano
    with _threads(args.threads):
        found = _scores(benchmark, args.model, args.device, check)
        against = _scores(benchmark, args.against, args.device, check) if args.against else None
    if args.sheet:
        with atomic_path(args.sheet) as partial:
            contact_sheet(benchmark, found).save(partial, "PNG")
    rows: dict[str, dict[str, float]] = {}
    for category in sorted(found.values):
        low, high = found.interval(category)
        rows[category] = {
            "prompts": len(found.values[category]),
            "score": found.mean(category),
            "low": low,
            "high": high,
        }
    if against is not None:
        for d in compare(found, against):
            rows[d.category] |= {"delta": d.delta, "delta_low": d.low, "delta_high": d.high}
    emit(args, {"benchmark": benchmark.name, "prompts": len(benchmark.prompts), "scores": rows}, _table(rows))
    return 0


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside, torch uses `count` threads; afterwards as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _benchmark(args: argparse.Namespace) -> Benchmark:
    from bagel_compress.scores.external_benchmark import load_benchmark
    from bagel_compress.scores.nano import nano_benchmark

    if args.benchmark:
        sys.path.append(str(Path.cwd()))  # so that a module in the working folder is found, as with `python -m`
        return load_benchmark(args.benchmark)
    share = 5 if args.quick else 1
    return nano_benchmark(240 // share, 168 // share, 100 // share, 60 // share)


def _scores(benchmark: Benchmark, model: str, device: str, check: Callable[[BagelConfig], None] | None) -> Scores:
    """The scores of a model; a progress bar over the prompts goes to stderr. `check` gets the model's configuration."""
    import torch
    from tqdm import tqdm

    from bagel_compress.run.load import open_model
    from bagel_compress.scores.benchmark import run

    sampler = open_model(model, device, torch.float32 if device == "cpu" else None, check)
    with tqdm(total=len(benchmark.prompts), unit="prompt", desc=model, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.update(done - bar.n)

        return run(benchmark, sampler, on_batch=show)


def _expect_nano(config: BagelConfig) -> None:
    """Raises InputError if the largest pictures of the model are not of BAGEL-nano's size."""
    from bagel_compress.errors import InputError
    from bagel_compress.nano_training.model import CONFIG

    if (side := config.max_latent_size * config.image_stride) != CONFIG.max_latent_size * CONFIG.image_stride:
        raise InputError(
            f"this model is not BAGEL-nano or a build of it: its pictures have up to {side} pixels a side, nano's"
            f" {CONFIG.max_latent_size * CONFIG.image_stride}; give a benchmark for this model with --benchmark."
        )


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A text table of scores in percent with their 95 % intervals."""
    lines = []
    for category, row in rows.items():
        line = f"{category:18s} {row['prompts']:4.0f}  {100 * row['score']:5.1f}"
        line += f" ({100 * row['low']:5.1f}..{100 * row['high']:5.1f})"
        if "delta" in row:
            line += f"   {100 * row['delta']:+5.1f} ({100 * row['delta_low']:+5.1f}..{100 * row['delta_high']:+5.1f})"
        lines.append(line)
    return "\n".join(lines)


def _train(args: argparse.Namespace) -> int:
    from bagel_compress.nano_training.reproduce import NAME, NanoRecipe, reproduce

    with _threads(args.threads):
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
