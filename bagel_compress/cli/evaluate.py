"""Verb evaluate: published benchmarks on a model, from their own files (docs/evaluation.md)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, add_verb, emit, say

if TYPE_CHECKING:
    from bagel_compress.evaluate.evaluate import Run, Scorers

KEY = "BAGEL_JUDGE_KEY"


def register(verbs: Any) -> None:
    """Adds the parser of evaluate."""
    parser = add_verb(
        verbs, "evaluate", "run a published benchmark on a model, from the benchmark's own files",
        "bagel-compress evaluate mme out/nf4 --data mme --out eval/mme-nf4 --against eval/mme-full --device cuda\n"
        "  bagel-compress evaluate geneval out/nf4 --data geneval --out eval/geneval --detector m2f --clip clip\n"
        f"  {KEY}=... bagel-compress evaluate wise out/nf4 --data wise --out eval/wise --think \\\n"
        "      --judge https://api.example.com/v1 --judge-model gpt-4o-2024-11-20\n"
        "  bagel-compress evaluate --suite smoke out/nf4 --data benchmarks --out eval/smoke --against eval/smoke-full",
    )  # fmt: skip
    parser.add_argument("benchmark", metavar="BENCHMARK", nargs="?", help="its name; docs/evaluation.md has the list")
    parser.add_argument("model", metavar="MODEL", help="checkpoint, artifact or export folder, or a Hub id")
    parser.add_argument(
        "--suite", choices=("smoke",),
        help="instead of one benchmark: a subset of all that need no judge and lie under --data, each in a folder of"
        " its name; exit 1 if one is worse than --against by more than chance explains",
    )  # fmt: skip
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="the benchmark's files")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="results; run again to go on")
    parser.add_argument("--against", type=Path, metavar="DIR", help="--out of that run of another model, to compare")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1; with --processes several by commas (cpu)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    _settings(parser)
    _parts(parser)
    _scorers(parser)
    add_json(parser)
    parser.set_defaults(verb=_evaluate)


def _settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings (the defaults are the official ones; the report names every other)")
    group.add_argument("--think", action="store_true", help="let the model plan in words first")
    group.add_argument("--seed", type=int, default=42, help="of every item's own noise (%(default)s)")
    group.add_argument("--limit", type=int, default=0, metavar="N", help="so many units, spread evenly (all)")
    group.add_argument("--steps", type=int, default=0, help="points of the schedule")
    group.add_argument("--side", type=int, default=0, help="pixels of drawn pictures (1024)")
    group.add_argument("--pictures", type=int, default=0, help="per prompt (GenEval: 4)")


def _parts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parts")
    group.add_argument("--batch", type=int, default=8, help="pictures drawn together where the settings allow it (8)")
    group.add_argument("--processes", type=int, default=1, help="each takes its share and the next device (1)")
    group.add_argument("--executor", choices=("local", "ray"), default="local")
    group.add_argument("--cluster", metavar="ADDRESS", help="of a running Ray cluster")
    group.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="do only share I (from 0) of N")


def _scorers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scoring")
    group.add_argument("--detector", metavar="DIR", help="GenEval: a detector in the layout of the Hub")
    group.add_argument("--clip", metavar="DIR", help="GenEval: a CLIP model in the layout of the Hub, for colours")
    group.add_argument("--judge", metavar="URL", help="root of an OpenAI-style API, as in https://host/v1")
    group.add_argument("--judge-model", metavar="M", help=f"the judge; the key is read from {KEY}")
    group.add_argument("--judge-price", type=float, nargs=2, metavar=("IN", "OUT"), help="per million tokens")


def _shard(value: str) -> tuple[int, int]:
    index, _, count = value.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{value!r} is no share; expected I/N with I from 0 to N-1, as in 0/4")
    return int(index), int(count)


def _evaluate(args: argparse.Namespace) -> int:
    from bagel_compress.errors import BenchmarkError

    if bool(args.suite) == bool(args.benchmark):
        raise BenchmarkError("give either a BENCHMARK and a MODEL or --suite smoke and a MODEL.")
    for name in ("limit", "steps", "side", "pictures"):
        if getattr(args, name) < 0:
            raise BenchmarkError(f"--{name} is {getattr(args, name)}, expected a positive number.")
    if args.batch < 1 or args.processes < 1:
        raise BenchmarkError("--batch and --processes are at least 1.")
    return _suite(args) if args.suite else _one(args)


def _one(args: argparse.Namespace) -> int:
    from bagel_compress.evaluate.evaluate import evaluate

    report = evaluate(
        _run(args), _scorers_of(args, args.against), args.processes, args.executor, args.cluster, say
    )  # fmt: skip
    if report is None:
        emit(args, {"finished": False}, "This share is done; run the others, then any of them scores.")
        return 0
    emit(args, report.model_dump(mode="json") | {"finished": True}, report.markdown())
    return 0


def _suite(args: argparse.Namespace) -> int:
    from bagel_compress.evaluate.smoke import smoke

    reports, absent = smoke(_run(args, "smoke"), _scorers_of(args, None), args.against, say)
    worse = [f"{report.title}: {score.name} is worse by {-(score.delta or 0):.2f}" for report in reports
             for score in report.worse]  # fmt: skip
    text = "\n".join([*(report.markdown() for report in reports), *(f"no data for {name}" for name in absent), *worse])
    data = {"reports": [r.model_dump(mode="json") for r in reports], "absent": absent, "worse": worse}
    emit(args, data, text)
    return 1 if worse else 0


def _run(args: argparse.Namespace, benchmark: str | None = None) -> Run:
    from bagel_compress.evaluate.evaluate import Run

    names = ("model", "device", "dtype", "think", "seed", "limit", "steps", "side", "pictures", "batch", "shard")
    values = {name: getattr(args, name) for name in names}
    return Run(benchmark=benchmark or args.benchmark, data=str(args.data), out=str(args.out), **values)


def _scorers_of(args: argparse.Namespace, against: Path | None) -> Scorers:
    from bagel_compress.errors import BenchmarkError
    from bagel_compress.evaluate.evaluate import Scorers
    from bagel_compress.evaluate.judge import Judge

    if bool(args.judge) != bool(args.judge_model):
        raise BenchmarkError("--judge and --judge-model go together: the API's root and the model that judges.")
    prices = tuple(args.judge_price) if args.judge_price else None
    judge = Judge(args.judge, args.judge_model, os.environ.get(KEY, ""), prices) if args.judge else None
    return Scorers(args.detector, args.clip, judge, against, args.device.split(",")[0])
