"""DF11: encoding and decoding speed beside the `dfloat11` package's compressor and zipnn, same tensor, same run.

    python benchmarks/bench_df11.py [--rows 18944] [--columns 3584] [--repeats 5] [--clock wall]

The tensor has the shape of an MLP weight of BAGEL-7B-MoT (136 MB: two threads on 26 MB take less time than it may take
the system to give them two cores) and trained-like statistics: normal with deviation 0.02, log-normal scales of rows
and columns, one weight in 500 six times larger. Buffers are warm; every figure is the median of the repeats. MB and GB
are powers of ten of bf16.
"encode" makes the six tensors and, as in a build, decodes and compares them: where codes start is found that way. The
peers do not check. The official compressor's own check needs a GPU and is left out, and so is its table of codes on the
terminal.
Ends in one JSON line. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import platform
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
import torch

from bagel_compress.codecs import DF11
from bagel_compress.codecs.base import InMemory, Unit
from bagel_compress.codecs.df11.decode import check_parts, decode_into
from bagel_compress.io.tensor_spec import TensorSpec

NAME = "bench"


def main() -> None:
    args = _arguments()
    weights = mixed(args.rows, args.columns)
    bench = Bench(weights, args.repeats, time.process_time if args.clock == "cpu" else time.perf_counter)
    works = [work for threads in (1, 2) for work in bench.works(threads)]
    peers, bits = zipnn_works(bench)
    works += [*peers, Work("np.copyto", lambda: np.copyto(bench.copy, bench.words))]
    rows = bench.rates(works)
    rows["dfloat11 1t"], theirs = official_rate(bench)
    report(args, bench, rows, bits, theirs)


@dataclass(frozen=True)
class Work:
    """What is timed; `prepare` is not."""

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], None] = lambda: None
    threads: int = 1


class Bench:
    """The tensor, its coded form, and warm buffers."""

    def __init__(self, weights: torch.Tensor, repeats: int, clock: Callable[[], float]) -> None:
        self.weights, self.repeats, self.clock = weights, repeats, clock
        self.codec = DF11()
        self.unit = Unit(NAME, (TensorSpec("BF16", tuple(weights.shape), f"{NAME}.weight"),))
        self.source = InMemory({f"{NAME}.weight": weights})
        self.parts = self.codec.encode(self.unit, {f"{NAME}.weight": weights})
        self.out = torch.zeros(weights.numel(), dtype=torch.bfloat16)
        self.words = weights.view(torch.int16).numpy().reshape(-1)
        self.copy = np.zeros_like(self.words)

    def works(self, threads: int) -> list[Work]:
        return [
            Work(f"{name} {threads}t", work, threads=threads)
            for name, work in (
                ("encode", self.encode),
                ("decode", self.decode),
            )
        ]

    def rates(self, works: list[Work]) -> dict[str, float]:
        """bf16 bytes per second, medians; all take turns, so that a busy moment of the machine hits all alike."""
        seconds: dict[str, list[float]] = {work.name: [] for work in works}
        for turn in range(self.repeats + 1):
            for work in works:
                torch.set_num_threads(work.threads)
                work.prepare()
                start = self.clock()
                work.run()
                if turn:  # the first one warms up
                    seconds[work.name].append(self.clock() - start)
        return {name: self.weights.numel() * 2 / median(times) for name, times in seconds.items()}

    def encode(self) -> None:
        for _ in self.codec.begin(self.unit, self.source).chunks():
            pass

    def decode(self) -> None:
        decode_into(check_parts(self.unit, self.parts), self.out)


def mixed(rows: int, columns: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
    weights *= np.exp(rng.normal(0, 0.35, (rows, 1)).astype(np.float32))
    weights *= np.exp(rng.normal(0, 0.25, (1, columns)).astype(np.float32))
    weights[rng.random((rows, columns)) < 0.002] *= 6
    return torch.from_numpy(weights).bfloat16()


def zipnn_works(bench: Bench) -> tuple[list[Work], float]:
    """Its encoder and decoder, and its bits per weight."""
    if importlib.util.find_spec("zipnn") is None:
        return [], float("nan")
    from zipnn import ZipNN

    works, data = [], bench.words.tobytes()
    fresh = bytearray(data)

    def refresh() -> None:  # compress() moves the sign bits of its input in place
        fresh[:] = data

    for threads in (1, 2):
        coder = ZipNN(bytearray_dtype="bfloat16", input_format="byte", threads=threads)
        refresh()
        packed = coder.compress(fresh)
        if coder.decompress(packed) != data:
            raise SystemExit("zipnn did not give the tensor back; its figures would mean nothing")
        works.append(Work(f"zipnn encode {threads}t", partial(coder.compress, fresh), refresh))
        works.append(Work(f"zipnn decode {threads}t", partial(coder.decompress, packed)))
    return works, 8 * len(packed) / bench.weights.numel()


def official_rate(bench: Bench) -> tuple[float, bool | None]:
    """Bytes per second of the package's compressor, run once (it takes seconds), and whether its bytes are ours."""
    if importlib.util.find_spec("dfloat11") is None:
        return float("nan"), None
    stub = types.ModuleType("cupy")
    stub.RawModule = lambda path: types.SimpleNamespace(get_function=lambda name: None)  # type: ignore[attr-defined]
    sys.modules.setdefault("cupy", stub)
    if importlib.util.find_spec("pkg_resources") is None:  # setuptools has dropped it; the package asks it for a path
        path = types.SimpleNamespace(resource_filename=lambda *_: "decode.ptx")
        sys.modules["pkg_resources"] = path  # type: ignore[assignment]
    from dfloat11 import dfloat11_utils as utils

    start = bench.clock()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _, counter = utils.get_codec(bench.weights.flatten())
        codec, _, table = utils.get_32bit_codec(counter)
        luts = utils.get_luts(table)
        stream, rest, positions, gaps, _ = utils.encode_weights([bench.weights.flatten()], codec, 8, 512)
    seconds = bench.clock() - start
    theirs = {
        "luts": luts,
        "encoded_exponent": stream,
        "sign_mantissa": rest,
        "output_positions": positions.view(torch.uint8),
        "gaps": gaps,
    }
    same = all(torch.equal(part, bench.parts[f"{NAME}.{suffix}"]) for suffix, part in theirs.items())
    return bench.weights.numel() * 2 / seconds, same


def report(args: argparse.Namespace, bench: Bench, rows: dict[str, float], bits: float, theirs: bool | None) -> None:
    official = rows["dfloat11 1t"]
    print(f"{args.rows} x {args.columns} bf16, {bench.weights.numel() * 2 / 1e6:.1f} MB, {cpu()}, {args.clock} time")
    for name, rate in rows.items():
        print(f"{name:20s} {rate / 1e6:10.1f} MB/s {rate / official:9.1f} x dfloat11")
    size = sum(part.nbytes for part in bench.parts.values()) * 8 / bench.weights.numel()
    exponents = (bench.words.view(np.uint16) >> 7) & 255
    share = np.bincount(exponents, minlength=256) / exponents.size
    entropy = 8 - float((share[share > 0] * np.log2(share[share > 0])).sum())
    print(f"bits per weight: {size:.4f}; at the exponents' entropy {entropy:.4f}; zipnn {bits:.4f}")
    print(f"bytes equal to the dfloat11 package's: {theirs}")
    versions = {p: version(p) for p in ("dfloat11", "zipnn", "numba", "numpy", "torch") if importlib.util.find_spec(p)}
    for peer in sorted({"dfloat11", "zipnn"} - versions.keys()):
        print(f"{peer} is not installed and left out; pip install {peer}")
    print(
        json.dumps(
            {
                "bench": "df11",
                "cpu": cpu(),
                "clock": args.clock,
                "shape": [args.rows, args.columns],
                "mb_per_s": {name: round(rate / 1e6, 2) for name, rate in rows.items()},
                "times_dfloat11": {name: round(rate / official, 1) for name, rate in rows.items()},
                "bits_per_weight": round(size, 4),
                "entropy_bits": round(entropy, 4),
                "zipnn_bits": None if math.isnan(bits) else round(bits, 4),
                "bytes_equal_official": theirs,
                "versions": versions,
            }
        )
    )


def cpu() -> str:
    """Name of the processor and its cores, as far as the platform tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=18944)
    parser.add_argument("--columns", type=int, default=3584)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread on a busy machine"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
