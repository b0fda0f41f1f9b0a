"""What a repair gains per byte on BAGEL-nano: adapters by distillation against calibrated rounding and finer rates.

    python benchmarks/nano_repair.py [--steps 300] [--ranks 2 4 8] [--calibrated-ranks 2 4]

Both experts' linears are coded, everything else is bf16. NF4 with each weight rounded alone and with calibrated
rounding, each alone and with adapters of some ranks beside it (`finetune --recover`, packaged calibration set); and ecq
with calibrated rounding at the bits of each of them. Bits count the codes and the adapters in bf16, per weight of the
coded linears, at nano's shapes and for the same rank at the released model's, where adapters are small against the
weights. Prompts and errors are those of paired_nano.py, of a seed that nothing else uses and with no prompt of the
calibration set. Ratios are paired by picture: to NF4 rounded alone, to calibrated NF4, and to ecq of equal bits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from paired_nano import Answers, answers, fresh, path_errors, ratio

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.finetune.config import FinetuneConfig
from bagel_compress.finetune.loop import Trainer
from bagel_compress.finetune.lora import attach
from bagel_compress.finetune.processes import Processes
from bagel_compress.finetune.recover import open_repair
from bagel_compress.io.packaged import resource
from bagel_compress.run.load import open_model
from bagel_compress.scores.benchmark import Benchmark
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.released_header import TrueHeader

SEED = 98_771  # used nowhere else
ALONE, CALIBRATED = "format: nf4, double_quant: true", "rounding: {method: gptq, refit: true}"
SOURCE = resource("BAGEL-nano")
ROUNDED_ALONE, WITH_CALIBRATION, ECQ = "nf4", "nf4, calibrated", "ecq, calibrated"


@dataclass(frozen=True)
class Row:
    """A build that was measured. `rank` 0: no adapters; `bits` per weight at nano's shapes and at the released ones."""

    label: str
    rank: int
    bits: tuple[float, float]
    errors: np.ndarray  # of each picture
    equal_texts: float  # share in [0, 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="over NF4 rounded alone")
    parser.add_argument("--calibrated-ranks", type=int, nargs="+", default=[2, 4], help="over calibrated NF4")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = fresh(args.seed)
    reference = answers(benchmark, open_model(SOURCE, dtype=torch.float32))
    rows = []
    for label, rank, bits, found in _measured(args, benchmark):
        same = sum(a == b for a, b in zip(found.texts, reference.texts, strict=True)) / len(found.texts)
        rows.append(Row(label, rank, bits, path_errors(found, reference), same))
        print(f"{label}, rank {rank}: {rows[-1].errors.mean():.4f}", file=sys.stderr, flush=True)
    print("| build | adapters | bits, nano | bits, 7B | latent error | to NF4 alone | to calibrated NF4 |"
          " to ecq of equal bits | equal texts |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        others = (_row(rows, ROUNDED_ALONE), _row(rows, WITH_CALIBRATION), _row(rows, ECQ, row.bits[0]))
        cells = [row.label, f"rank {row.rank}" if row.rank else "", *(f"{bits:.2f}" for bits in row.bits)]
        cells += [f"{row.errors.mean():.4f}", *(_ratio(row, other) for other in others), f"{row.equal_texts:.1%}"]
        print(f"| {' | '.join(cells)} |")
    pictures = len(reference.latents)
    print(json.dumps({
        "benchmark": "nano_repair", "seed": args.seed, "steps": args.steps, "lr": args.lr, "pictures": pictures,
        "texts": len(reference.texts),
    }))  # fmt: skip
    return 0


def _row(rows: Sequence[Row], label: str, bits: float | None = None) -> Row:
    """The row of a build without adapters."""
    return next(r for r in rows if r.label == label and not r.rank and (bits is None or abs(r.bits[0] - bits) < 0.01))


def _ratio(row: Row, other: Row) -> str:
    if row is other:
        return ""
    value, low, high = ratio(row.errors, other.errors)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _measured(
    args: argparse.Namespace, benchmark: Benchmark
) -> Iterator[tuple[str, int, tuple[float, float], Answers]]:
    """Label, rank (0: no adapters), bits per weight at both shapes, answers."""
    codecs = (
        (ROUNDED_ALONE, ALONE, args.ranks),
        (WITH_CALIBRATION, f"{ALONE}, scale: mse, {CALIBRATED}", args.calibrated_ranks),
    )
    rates = set[float]()
    for label, codec, ranks in codecs:
        with TemporaryDirectory() as folder:
            build, recipe = _built(codec, Path(folder) / "build")
            for rank in (0, *ranks):
                sampler = open_model(build.path, dtype=torch.float32)
                if rank:
                    attach(sampler.bagel, _repaired(build, rank, args, Path(folder) / f"rank-{rank}"))
                bits = _bits(recipe, rank)
                rates.add(round(bits[0], 2))
                yield label, rank, bits, answers(benchmark, sampler)
    for rate in sorted(rates):
        with TemporaryDirectory() as folder:
            build, recipe = _built(f"format: ecq, bits: {rate}, {CALIBRATED}", Path(folder) / "build")
            yield ECQ, 0, _bits(recipe, 0), answers(benchmark, open_model(build.path, dtype=torch.float32))


def _built(codec: str, out: Path) -> tuple[Artifact, Recipe]:
    rules = f"[{{match: {{component: llm, kind: linear}}, codec: {{{codec}}}}}, {{match: {{}}, codec: raw}}]"
    recipe, checkpoint = Recipe.parse(f"{{name: measured, rules: {rules}}}", codec), Checkpoint.open(SOURCE)
    return compress(make_plan(checkpoint, recipe), checkpoint, out), recipe


def _repaired(build: Artifact, rank: int, args: argparse.Namespace, out: Path) -> Path:
    config = FinetuneConfig.model_validate({
        "model": str(build.path), "lora": {"rank": rank, "alpha": rank}, "recover": {"reference": str(SOURCE)},
        "steps": args.steps, "save_every": args.steps, "tokens": 1500, "lr": args.lr, "warmup": 10,
        "schedule": "cosine", "dtype": "float32", "recompute": False,
    })  # fmt: skip
    trainee, lessons = open_repair(config, Processes())
    for result in Trainer(trainee, config, out, Processes(), lessons).steps():
        if result.step in (1, args.steps):
            print(f"rank {rank}, step {result.step}: {result.metrics['loss']:.5f}", file=sys.stderr, flush=True)
    return out / f"{args.steps:07d}"


def _bits(recipe: Recipe, rank: int) -> tuple[float, float]:
    """Stored bits per weight of the coded linears, adapters of a rank in bf16 included: at nano's shapes, at 7B's."""
    found = []
    for header in (Checkpoint.open(SOURCE), TrueHeader()):
        placed = [p for p in make_plan(header, recipe).placements if p.codec.format != "raw"]
        weights = sum(p.unit.numel for p in placed)
        halves = sum(rank * sum(spec.shape) for p in placed for spec in p.unit.specs)
        found.append((8 * sum(p.nbytes for p in placed) + 16 * halves) / weights)
    return found[0], found[1]


if __name__ == "__main__":
    sys.exit(main())
