"""ecq: encoding and decoding speed beside DF11 and zipnn, same tensor, same run.

    python benchmarks/bench_ecq.py [--rows 18944] [--columns 3584] [--bits 2.5 4.13 6] [--repeats 5] [--clock wall]

Tensor, clocks and rules are those of bench_df11.py: an MLP weight of BAGEL-7B-MoT with trained-like statistics, warm
buffers, medians, MB of bf16. "encode" counts, searches the step, writes, decodes and compares. zipnn and DF11 are
lossless and stand beside it for their speed. Ends in one JSON line. Missing peers are left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from functools import partial

import torch
from bench_df11 import NAME, Bench, Work, cpu, mixed, zipnn_works

from bagel_compress.codecs.base import InMemory, Unit
from bagel_compress.codecs.ecq import Ecq
from bagel_compress.codecs.ecq.device import StoredWeight
from bagel_compress.io.tensor_spec import TensorSpec


def main() -> None:
    args = _arguments()
    bench = Bench(mixed(args.rows, args.columns), args.repeats, _clock(args.clock))
    weight = f"{NAME}.weight"
    unit, source = (
        Unit(weight, (TensorSpec("BF16", tuple(bench.weights.shape), weight),)),
        InMemory({weight: bench.weights}),
    )
    works, rates = [], {}
    for bits in args.bits:
        codec = Ecq(bits=bits)
        parts = codec.encode(unit, {weight: bench.weights})
        rates[str(bits)] = round(8 * sum(part.nbytes for part in parts.values()) / bench.weights.numel(), 4)
        stored = StoredWeight(unit, parts)
        [whole] = stored.slices(bench.weights.numel())
        for threads in (1, 2):
            works.append(Work(f"encode {bits} {threads}t", partial(_encode, codec, unit, source), threads=threads))
            works.append(Work(f"decode {bits} {threads}t", partial(whole.decode_into, bench.out), threads=threads))
    peers, _ = zipnn_works(bench)
    rows = bench.rates([*works, *bench.works(1), *peers])
    missing = [peer for peer in ("zipnn",) if importlib.util.find_spec(peer) is None]
    print(f"{args.rows} x {args.columns} bf16, {cpu()}, {args.clock} time; stored bits {rates}")
    for name, rate in rows.items():
        label = f"df11 {name}" if name in ("encode 1t", "decode 1t") else name
        print(f"{label:24s} {rate / 1e6:10.1f} MB/s")
    print(f"not installed: {', '.join(missing) or 'none'}")
    figures = {name: round(rate / 1e6, 1) for name, rate in rows.items()}
    print(json.dumps({"bench": "ecq", "cpu": cpu(), "stored_bits": rates, "mb_per_s": figures, "missing": missing}))


def _encode(codec: Ecq, unit: Unit, source: InMemory) -> None:
    for _ in codec.begin(unit, source).chunks():
        pass


def _clock(name: str):  # type: ignore[no-untyped-def]
    import time

    return time.process_time if name == "cpu" else time.perf_counter


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=18944)
    parser.add_argument("--columns", type=int, default=3584)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 4.13, 6.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
