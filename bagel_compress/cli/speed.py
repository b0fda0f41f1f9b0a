"""The verb speed: time and error of a model with fewer evaluations of the network, and presets within its limits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, add_verb, emit, say

if TYPE_CHECKING:
    from bagel_compress.scores.benchmark import Benchmark
    from bagel_compress.validation.price_list import Price, PriceList

WIDTH = 58  # of the longest name of a setting


def register(verbs: Any) -> None:
    """Adds the parser of speed."""
    speed = add_verb(
        verbs, "speed", "measure passes, seconds and error of solvers and step caches on a trace",
        "bagel-compress speed out/nf4 --trace bagel.trace.safetensors --out out/nf4-speed\n"
        "  bagel-compress speed BAGEL-7B-MoT --class 8-bit --trace bagel.trace.safetensors --device cuda",
    )  # fmt: skip
    speed.add_argument("model", metavar="MODEL", help="artifact or full-precision checkpoint folder")
    speed.add_argument("--trace", required=True, nargs="+", metavar="FILE", help="traces of the model's source")
    speed.add_argument(
        "--class", dest="level", choices=("16-bit", "8-bit", "4-bit"),
        help="limits of this class (default: the recipe's; of a checkpoint 8-bit)",
    )  # fmt: skip
    speed.add_argument("--target", metavar="T", help="also apply the target's seconds_per_image, on its own GPU")
    speed.add_argument(
        "--benchmark", metavar="nano|MODULE:FUNCTION",
        help="also draw and score a benchmark's pictures with every setting (nano: BAGEL-nano and its builds)",
    )  # fmt: skip
    speed.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    speed.add_argument("--out", type=Path, default=Path("speed"), metavar="DIR",
                       help="folder for speed.json and speed.svg (%(default)s)")  # fmt: skip
    add_json(speed)
    speed.set_defaults(verb=_speed)


def _speed(args: argparse.Namespace) -> int:
    from bagel_compress.budgets.device_option import one_device
    from bagel_compress.run.target import Target
    from bagel_compress.validation.price_list import model_prices

    target = None if args.target is None else Target.load(args.target)
    benchmark = None if args.benchmark is None else _benchmark(args.benchmark)
    found = model_prices(args.model, args.trace, args.level, one_device(args.device), target, say, benchmark)
    data, chart = found.save(args.out)
    emit(args, found.model_dump(mode="json") | {"chart": str(chart)}, f"{_table(found)}\n{data}\n{chart}")
    return 0


def _moved(price: Price) -> str:
    """The largest move of a score, in points."""
    moves = [change.delta for change in price.scores.values()]
    return f"{max(moves, key=abs):+.1f}" if moves else ""


def _benchmark(name: str) -> Benchmark:
    """A hundred drawings and forty edits of the nano world, or what MODULE:FUNCTION returns."""
    from bagel_compress.scores.external_benchmark import load_benchmark
    from bagel_compress.scores.nano import nano_benchmark

    if name == "nano":
        return nano_benchmark(draw=100, ask=0, edit=40, think=0)
    sys.path.append(str(Path.cwd()))  # as `python -m` has it: the module may lie where the command is typed
    return load_benchmark(name)


def _table(found: PriceList) -> str:
    scored = any(price.scores for price in found.prices)
    lines = [
        f"{found.model} on {found.device}",
        f"{'settings':<{WIDTH}}{'passes':>8}{'seconds':>9}{'latent':>9}{'PSNR':>7}{'scores' if scored else '':>9}",
    ]
    for price in sorted(found.prices, key=lambda p: -p.passes):
        verdict = f"   breaks {', '.join(price.broken)}" if price.broken else ""
        lines.append(
            f"{price.name:<{WIDTH}}{price.passes:>8.1f}{price.seconds:>9.3f}{price.latent:>9.4f}{price.psnr:>7.1f}"
            f"{_moved(price):>{9 * scored}}{verdict}"
        )
    return "\n".join([*lines, "presets for the recipe:", found.recipe_lines()])
