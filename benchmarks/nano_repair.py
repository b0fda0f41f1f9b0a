"""What a repair gains per byte on BAGEL-nano: adapters by distillation against calibrated rounding and finer rates.

    python benchmarks/nano_repair.py [--steps 300] [--ranks 1 2 4 8]

Both experts' linears are coded, everything else is bf16. NF4 with each weight rounded alone and with calibrated
rounding, each alone and with adapters of some ranks beside it (`finetune --recover`, packaged calibration set); and ecq
at the bits that the adapters bring these to. Bits count the codes and the adapters in bf16, per weight of the coded
linears, at nano's shapes and for the same rank at the released model's, where adapters are small against the weights.
Prompts and errors are those of paired_nano.py, of a seed that nothing else uses; ratios are paired, to NF4 rounded
alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

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
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.released_header import TrueHeader

SEED = 98_771  # used nowhere else
ALONE, CALIBRATED = "format: nf4, double_quant: true", "rounding: {method: gptq, refit: true}"
SOURCE = resource("BAGEL-nano")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rates", type=float, nargs="+", default=[4.13, 4.5, 5.0, 6.0])
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = fresh(args.seed)
    reference = answers(benchmark, open_model(SOURCE, dtype=torch.float32))
    base = None
    print("| build | adapters | bits, nano | bits, 7B | latent error | ratio | equal texts |")
    print("|---|---|---|---|---|---|---|")
    for label, rank, bits, found in _measured(args, benchmark):
        errors = path_errors(found, reference)
        base = errors if base is None else base
        value, low, high = ratio(errors, base)
        same = sum(a == b for a, b in zip(found.texts, reference.texts, strict=True)) / len(found.texts)
        adapters = f"rank {rank}" if rank else ""
        print(f"| {label} | {adapters} | {bits[0]:.2f} | {bits[1]:.2f} | {errors.mean():.4f} |"
              f" {value:.2f} [{low:.2f}, {high:.2f}] | {100 * same:.1f} |", flush=True)  # fmt: skip
    print(json.dumps({"benchmark": "nano_repair", "seed": args.seed, "steps": args.steps, "lr": args.lr}))
    return 0


def _measured(args: argparse.Namespace, benchmark: object) -> Iterator[tuple[str, int, tuple[float, float], Answers]]:
    """Label, rank (0: no adapters), bits per weight at both shapes, answers."""
    codecs = {"nf4": ALONE, "nf4, calibrated": f"{ALONE}, scale: mse, {CALIBRATED}"}
    for label, codec in codecs.items():
        with TemporaryDirectory() as folder:
            build, recipe = _built(codec, Path(folder) / "build")
            yield label, 0, _bits(recipe, 0), answers(benchmark, open_model(build.path, dtype=torch.float32))
            for rank in args.ranks:
                adapter = _repaired(build, rank, args, Path(folder) / f"rank-{rank}")
                sampler = open_model(build.path, dtype=torch.float32)
                attach(sampler.bagel, adapter)
                yield label, rank, _bits(recipe, rank), answers(benchmark, sampler)
    for rate in args.rates:
        with TemporaryDirectory() as folder:
            build, recipe = _built(f"format: ecq, bits: {rate}, {CALIBRATED}", Path(folder) / "build")
            yield (
                "ecq, calibrated",
                0,
                _bits(recipe, 0),
                answers(benchmark, open_model(build.path, dtype=torch.float32)),
            )


def _built(codec: str, out: Path) -> tuple[Artifact, Recipe]:
    rules = f"[{{match: {{component: llm, kind: linear}}, codec: {{{codec}}}}}, {{match: {{}}, codec: raw}}]"
    recipe, checkpoint = Recipe.parse(f"{{name: measured, rules: {rules}}}", codec), Checkpoint.open(SOURCE)
    return compress(make_plan(checkpoint, recipe), checkpoint, out), recipe


def _repaired(build: Artifact, rank: int, args: argparse.Namespace, out: Path) -> Path:
    config = FinetuneConfig.model_validate({
        "model": str(build.path), "lora": {"rank": rank, "alpha": rank}, "recover": {"reference": str(SOURCE)},
        "steps": args.steps, "save_every": args.steps, "tokens": 1500, "lr": args.lr, "warmup": 10,
        "schedule": "cosine",
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
